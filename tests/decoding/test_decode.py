"""Decoding against brute force and against plain Python restatements of both beam searches."""

import jax
import numpy as np
import pytest

from tests.support.decoding_case import (
  EOS,
  ROWS,
  VOCABULARY,
  all_finished,
  check,
  make_keys,
  make_table,
  mix,
  reference_search,
  run,
  sequences,
  standard_search,
)


@pytest.mark.parametrize(("min_length", "power"), [(0, 0.6), (2, 0.0), (1, -1.0)])
def test_wide_beam_is_brute_force(min_length, power):
  for seed in range(2):
    table, prompt = make_table(seed), [2, 3]
    expected = all_finished(table[0], prompt, 4, min_length, power)
    result = run(
      "beam", table, [prompt], 341, max_length=4, min_length=min_length, length_penalty=power
    )
    found = len(expected)
    assert sequences(result)[:found] == [tokens for _, tokens in expected]
    np.testing.assert_allclose(result.scores[0, :found], [c[0] for c in expected], rtol=2e-5)
    # The places left over hold the unfinished sequences, then bare prompts.
    unfinished = sequences(result)[found : found + 256]
    assert all(EOS not in s and len(s) == 6 for s in unfinished)
    assert len(set(map(tuple, unfinished))) == min(256, 341 - found)
    assert (np.diff(result.scores[0, found : found + 256]) <= 0).all()


@pytest.mark.parametrize("mode", ["standard", "reference"])
@pytest.mark.parametrize(("beams", "max_length", "min_length"), [(3, 8, 0), (5, 7, 4), (4, 1, 0)])
def test_beam_search_equals_plain_python(mode, beams, max_length, min_length):
  search = standard_search if mode == "standard" else reference_search
  batch, vocabulary = 30, 7
  for eos_bonus in (-1.0, 1.0):
    table = make_table(11, batch, vocabulary, eos_bonus)
    result = run(
      "beam", table, [[3]] * batch, beams, max_length=max_length, min_length=min_length, mode=mode
    )
    for item in range(batch):
      check(result, search(table[item], [3], beams, max_length, min_length), item)
  if mode == "reference" and max_length > 1:  # the quirk of this mode did occur
    found = [s for item in range(batch) for s in sequences(result, item)]
    assert any(s[-2:] == [EOS, EOS] for s in found)


def test_reference_mode_extends_finished_beams():
  """The best beam continues, the second ends at once and returns as eos eos."""
  table = np.full((1, ROWS, VOCABULARY), -20.0, np.float32)
  start = mix(0, 2, 0)
  table[0, start, [3, EOS]] = np.log([0.6, 0.4])
  table[0, mix(start, 3, 1), [3, 4]] = np.log([0.9, 0.1])
  table[0, mix(start, EOS, 1), EOS] = 0.0
  table[0, mix(mix(start, 3, 1), 3, 2), [EOS]] = 0.0
  table[0, mix(mix(start, EOS, 1), EOS, 2), [EOS]] = 0.0
  result = run("beam", table, [[2]], 3, max_length=5, mode="reference")
  check(result, reference_search(table[0], [2], 3, 5, 0))
  assert sequences(result) == [[2, 3, 3, EOS], [2, EOS, EOS, EOS], [2, EOS, EOS]]
  standard = run("beam", table, [[2]], 3, max_length=5)
  assert [2, EOS] in sequences(standard)
  assert all(s.count(EOS) <= 1 for s in sequences(standard))


@pytest.mark.parametrize("mode", ["standard", "reference"])
def test_one_beam_is_greedy(mode):
  table = make_table(5, 20)
  greedy = run("greedy", table, [[2]] * 20, max_length=7, min_length=1)
  beam = run("beam", table, [[2]] * 20, 1, mode=mode, max_length=7, min_length=1)
  jax.tree.map(np.testing.assert_array_equal, greedy, beam)
  for item in range(20):
    check(greedy, reference_search(table[item], [2], 1, 7, 1), item)


@pytest.mark.parametrize(
  ("kind", "rows", "options"),
  [
    ("beam", 3, {"mode": "standard"}),
    ("beam", 3, {"mode": "reference"}),
    ("sample", 3, {"top_k": 4, "top_p": 0.9}),
  ],
)
def test_items_do_not_depend_on_batch_or_padding(kind, rows, options):
  prompts = [[2], [2, 3], [4, 4], [3], [2]]
  table = make_table(8, len(prompts), 7, eos_bonus=0.5)
  padded = [p + [6] * (3 - len(p)) for p in prompts]  # junk beyond the prompt must not count
  keys = make_keys(2, len(prompts))
  options = dict(max_length=5, min_length=3, no_repeat_ngram=2, **options)
  together = run(kind, table, padded, rows, list(map(len, prompts)), keys=keys, **options)
  assert len({s for item in together.lengths.tolist() for s in item}) > 2
  for item, prompt in enumerate(prompts):
    one = slice(item, item + 1)
    shorter = [prompt + [5] * (2 - len(prompt))]  # other junk, and less of it
    alone = run(kind, table[one], shorter, rows, [len(prompt)], keys=keys[one], **options)
    assert sequences(alone) == sequences(together, item)
    np.testing.assert_array_equal(alone.lengths[0], together.lengths[item])
    np.testing.assert_allclose(alone.scores[0], together.scores[item], rtol=1e-6)
    start = len(prompt)
    for tokens in sequences(alone):
      assert tokens[:start] == prompt
      assert start + 4 <= len(tokens) <= start + 5
      assert EOS not in tokens[start : start + 3]
