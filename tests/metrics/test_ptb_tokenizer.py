"""Tokens of captions against recordings of the Java tokenizer; the scanner; lower case."""

import gzip
import json
import random
import re
import shutil
import time

import pytest

from mplug_jax.metrics.captioning import tokenize
from mplug_jax.metrics.captioning.ptb import lower_case
from mplug_jax.metrics.captioning.ptb import scanner as automaton
from mplug_jax.scenes import scene
from mplug_jax.scenes import text as scene_text
from tests.support.paths import GOLDEN


def recorded():
  with gzip.open(GOLDEN / "ptb_tokens.json.gz") as file:
    record = json.load(file)
  return record["captions"], record["tokens"]


def test_5000_recorded_captions_have_the_tokens_of_the_java_program():
  captions, tokens = recorded()
  assert len(captions) == 5000
  result = tokenize(captions)
  assert [(c, o, t) for c, o, t in zip(captions, result, tokens) if o != t] == []


@pytest.mark.parametrize(
  ("caption", "tokens"),
  [
    (
      "A man can't ride the U.S. Army's \"old\" horse.",
      "a man ca n't ride the u.s. army 's old horse",
    ),
    (
      "It's gonna cost $5.50 (or 1 1/2 times that)!",
      "it 's gon na cost $ 5.50 -lrb- or 1\u00a01/2 times that -rrb-",
    ),
    ("Two kids' toys, half-eaten...", "two kids toys half-eaten"),
    ("www.flickr.com &amp; me@example.com :-) x", "www.flickr.com & me@example.com :--rrb- x"),
    ("caf\u00e9 \u201cStop\u201d \u2014 3\u00bd \u00a320", "caf\u00e9 stop 3 1/2 # 20"),
    ("so\u00adft \U0001f600 \u4f60\u597d", "soft \u4f60\u597d"),
    ("Www.1.aa and HTTP://X.Y/z", "www.1.aa and http://x.y/z"),
    (
      "The cap'n (cont'd.) said it's a li'l dog",
      "the cap'n -lrb- cont'd. -rrb- said it 's a li'l dog",
    ),
    ("two\nlines", "two lines"),
    ("two\rlines\u2028three\x0cfour", "two lines three four"),
    (" \u00a0. ", ""),
    ("", ""),
  ],
)
def test_tokens_of_a_caption(caption, tokens):
  assert tokenize([caption]) == [tokens]


def test_next_caption_decides_whether_a_letter_ends_a_sentence():
  assert tokenize(["This is plan A.", "The end of it"]) == ["this is plan a", "the end of it"]
  assert tokenize(["This is plan A.", "an end of it"]) == ["this is plan a.", "an end of it"]


def test_open_markup_keeps_captions_separate():
  assert tokenize(["see <a href='x", "y'> there", "end"]) == [
    "see <a\u00a0href='x\u00a0y'>",
    "there",
    "end",
  ]


def test_earlier_captions_do_not_change_tokens():
  captions, tokens = recorded()
  order = list(range(len(captions)))
  random.Random(0).shuffle(order)
  alone = re.compile(r"[A-Za-z]+( [A-Za-z]+)*")  # the neighbors cannot matter
  result = tokenize([captions[i] for i in order])
  assert [
    (captions[i], text)
    for i, text in zip(order, result)
    if alone.fullmatch(captions[i]) and text != tokens[i]
  ] == []
  assert tokenize(captions) == tokens


def test_a_caption_that_is_no_string_is_an_error():
  with pytest.raises(TypeError, match="caption 1 is None"):
    tokenize(["a", None])
  assert tokenize([]) == []


def test_tokenization_is_faster_than_the_java_program():
  package = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
  if shutil.which("java") is None:
    pytest.skip("no Java")
  config = scene.SceneConfig()
  captions = [
    caption for i in range(500) for caption in scene_text.captions(scene.scene(config, "train", i))
  ]
  start = time.perf_counter()
  expected = package.PTBTokenizer().tokenize(
    {i: [{"caption": caption}] for i, caption in enumerate(captions)}
  )
  middle = time.perf_counter()
  result = tokenize(captions)
  assert time.perf_counter() - middle < middle - start
  assert [[tokens] for tokens in result] == list(expected.values())


# The scanner.


def scan(patterns, text, names=None):
  scanner = automaton.Scanner(
    [automaton.Rule(*((p,) if isinstance(p, str) else p)) for p in patterns], names or {}
  )
  return scanner.match(text, 0)


@pytest.mark.parametrize(
  ("patterns", "text", "number", "end"),
  [
    (["ab", "a[bc]+"], "abcx", 1, 3),  # the longest
    (["a[bc]", "ab"], "ab", 0, 2),  # of two as long, the first
    (["a", ("a", "bc")], "abc", 1, 1),  # what follows counts for the length, and is left
    (["a", ("a", "bc")], "abd", 0, 1),
    ([("a+", "a?b")], "aaab", 0, 3),  # as much as possible for the pattern
    (['"gonna"'], "GoNnA", 0, 5),
    (["(a|b){2,3}"], "abab", 0, 3),
    (["(ab){2}"], "abab", 0, 4),
    (["(a|bc)*d?"], "abcad", 0, 5),
    (["[^a-c\\u00E9]+"], "xyz\u00e9", 0, 3),
    (["{D}+\\.[{D}_]"], "12._", 0, 4),
    (["b"], "a", -1, 0),
  ],
)
def test_the_longest_match_wins_then_the_first_rule(patterns, text, number, end):
  assert scan(patterns, text, {"D": "[0-9]"})[:2] == (number, end)


def test_match_returns_the_end_of_the_read_part():
  assert scan(["ab", "abcd"], "abcx")[2] == 4
  assert scan(["ab", "abcd"], "abx")[2] == 3
  assert scan(["ab+"], "abb")[2] == 4  # the end of the text was looked at


def test_the_scanner_agrees_with_backtracking_on_random_patterns():
  rng = random.Random(0)

  def pattern(depth):
    kind = rng.randrange(6 if depth else 2)
    if kind < 2:
      return rng.choice("abc")
    if kind == 2:
      return pattern(depth - 1) + pattern(depth - 1)
    if kind == 3:
      return f"({pattern(depth - 1)}|{pattern(depth - 1)})"
    return f"({pattern(depth - 1)}){rng.choice(['?', '*', '+', '{2}', '{1,2}'])}"

  for _ in range(200):
    one = pattern(3)
    dfa = automaton.Dfa([one], {})
    for _ in range(5):
      text = "".join(rng.choice("abc") for _ in range(6))
      assert dfa.ends(text, 0, 6) == [end for end in range(7) if re.fullmatch(one, text[:end])], (
        one,
        text,
      )


@pytest.mark.parametrize("pattern", ["a)", "(a", "a|b)"])
def test_a_wrong_pattern_is_an_error(pattern):
  with pytest.raises(ValueError, match="pattern"):
    automaton.Scanner([automaton.Rule(pattern)], {})


# Lower case: as java.lang.String.toLowerCase.


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("A\u0130\u00c9", "ai\u0307\u00e9"),
    ("\u039f\u0394\u039f\u03a3 \u03a3\u0391\u03a3", "\u03bf\u03b4\u03bf\u03c2 \u03c3\u03b1\u03c2"),
    ("\u0391\u03a3-\u0391\u03a3", "\u03b1\u03c3-\u03b1\u03c2"),  # a hyphen does not end the word
    ("\u0391-\u03a3", "\u03b1-\u03c2"),
    ("\u0391--\u03a3", "\u03b1--\u03c3"),
    ("\u0391:\u03a3", "\u03b1:\u03c3"),
    ("\u03911\u03a3", "\u03b11\u03c2"),
    ("\u03911.\u03a3", "\u03b11.\u03c3"),
    ("\u4e2d\u03a3", "\u4e2d\u03c3"),
  ],
)
def test_final_sigma_depends_on_the_word(text, expected):
  assert lower_case.lower(text) == expected
