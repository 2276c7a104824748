"""BLEU, ROUGE-L, CIDEr-D and CIDEr against recordings of pycocoevalcap."""

import gzip
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.metrics import captioning
from mplug_jax.metrics.captioning import bleu, cider, java_metrics, rouge
from mplug_jax.scenes import scene, text
from tests.support.paths import GOLDEN

NAMES = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"]


def recorded(name):
  with gzip.open(GOLDEN / f"caption_scores_{name}.json.gz") as file:
    return json.load(file)


def scene_captions():
  """Tokens of 834 scenes' sixth captions, and of their first five: 5,004 captions."""
  config = scene.SceneConfig()
  groups = [
    captioning.tokenize(text.captions(scene.scene(config, "train", i), 6)) for i in range(834)
  ]
  return [group[5] for group in groups], [group[:5] for group in groups]


def assert_equal_to_record(candidates, references, record):
  close = dict(rtol=0, atol=1e-9)
  scores, images = bleu.bleu(candidates, references)
  np.testing.assert_allclose(scores, record["bleu"], **close)
  np.testing.assert_allclose(images, record["bleu_images"], **close)
  images = rouge.rouge_l(candidates, references)
  np.testing.assert_allclose(images, record["rouge_images"], **close)
  np.testing.assert_allclose(images.mean(), record["rouge"], **close)
  images = captioning.CiderD(references).score(candidates, references)
  np.testing.assert_allclose(images, record["cider_images"], **close)
  np.testing.assert_allclose(images.mean(), record["cider"], **close)
  values = captioning.evaluate_tokens(
    {i: [c] for i, c in enumerate(candidates)}, dict(enumerate(references))
  )
  assert list(values) == NAMES
  np.testing.assert_allclose(
    list(values.values()),
    100 * np.array([*record["bleu"], record["rouge"], record["cider"]]),
    rtol=0,
    atol=1e-7,
  )


def test_scores_of_464_audio_captions_are_the_recorded_ones():
  record = recorded("audio")
  assert len(record["candidates"]) == 464
  assert_equal_to_record(record["candidates"], record["references"], record)


def test_scores_of_5000_scene_captions_are_the_recorded_ones():
  assert_equal_to_record(*scene_captions(), recorded("scenes"))


def test_scores_of_empty_equal_repeated_and_short_captions_are_the_recorded_ones():
  record = recorded("edges")
  assert "" in record["candidates"]
  assert [""] in record["references"]
  assert_equal_to_record(record["candidates"], record["references"], record)


def test_one_image_has_bleu_and_rouge_but_no_cider():
  record = recorded("edges")["one"]
  assert_equal_to_record(record["candidates"], record["references"], record)
  assert record["cider"] == 0 < record["rouge"]


def test_a_set_without_images_has_no_scores():
  scores, images = bleu.bleu([], [])
  assert not scores.any()
  assert images.shape == (4, 0)
  assert rouge.rouge_l([], []).shape == (0,)
  assert captioning.CiderD([["a b"]]).score([], []).shape == (0,)


def cosine_cider(candidate, references, groups):
  """Computes the paper's equation (2): normalized term frequencies, logarithms, cosines."""

  def counts(caption, n):
    words = caption.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return {gram: grams.count(gram) / len(grams) for gram in grams}

  def vector(caption, n):
    return {
      gram: tf
      * math.log(
        len(groups) / max(1, sum(any(gram in counts(c, n) for c in group) for group in groups))
      )
      for gram, tf in counts(caption, n).items()
    }

  total = 0
  for n in range(1, 5):
    for reference in references:
      a = vector(candidate, n)
      b = vector(reference, n)
      norm = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
      total += sum(x * b.get(gram, 0) for gram, x in a.items()) / norm if norm else 0
  return 10 * total / 4 / len(references)


def test_cider_without_d_is_the_mean_cosine_of_the_paper():
  record = recorded("audio")
  candidates = record["candidates"][:8]
  references = record["references"][:8]
  candidates[0] = "paper is is is crumpling crumpling"
  expected = [cosine_cider(c, r, references) for c, r in zip(candidates, references)]
  np.testing.assert_allclose(
    cider.Cider(references).score(candidates, references), expected, rtol=0, atol=1e-9
  )


def test_repetition_and_length_lower_cider_d_more_than_cider():
  references = [["a red square above a blue circle"], ["two dogs"], ["one cat on a mat"]]
  twice = [" ".join([group[0]] * 2) for group in references]
  plain, clipped = (
    scorer(references).score(twice, references) for scorer in (cider.Cider, cider.CiderD)
  )
  assert (clipped < plain).all()


def test_document_frequencies_score_like_their_references():
  record = recorded("audio")
  frequency = captioning.document_frequency(record["references"])
  reward = captioning.CiderD(frequency)
  five = [reference for group in record["references"][:40] for reference in group]
  groups = [group for group in record["references"][:40] for _ in range(5)]
  scores = reward.score(five, groups)
  expected = captioning.CiderD(record["references"]).score(five, groups)
  np.testing.assert_array_equal(scores, expected)
  one_by_one = [reward.score([caption], [group])[0] for caption, group in zip(five, groups)]
  np.testing.assert_allclose(scores, one_by_one, rtol=0, atol=1e-12)


def test_document_frequencies_of_too_few_images_are_an_error():
  with pytest.raises(ValueError, match="3 of 2 images"):
    captioning.CiderD(captioning.DocumentFrequency({("a",): 3}, 2))
  with pytest.raises(ValueError, match="there are none"):
    captioning.CiderD([])


def test_a_candidate_without_references_is_an_error():
  with pytest.raises(ValueError, match="candidate 1 has no references"):
    captioning.CiderD([["a"], ["b"]]).score(["a", "b"], [["a"], []])


def test_evaluation_tokenizes_captions():
  values = captioning.evaluate(
    {7: ["A dog's running!"], 8: ["Two cats."]},
    {7: ["a dog 's running"], 8: ["two cats"]},
    ["BLEU-1", "ROUGE-L"],
  )
  assert list(values) == ["BLEU-1", "ROUGE-L"]
  np.testing.assert_allclose(list(values.values()), 100, atol=1e-6)


@pytest.mark.parametrize(
  ("candidates", "references", "metrics", "words"),
  [
    ({1: ["a"]}, {1: ["a"]}, ["BLEU"], "metric 'BLEU' is unknown"),
    ({}, {}, NAMES, "no captions"),
    ({1: ["a"]}, {2: ["a"]}, NAMES, "different images: 2 images: 1, 2"),
    ({1: ["a", "b"]}, {1: ["a"]}, NAMES, "exactly one candidate; wrong for 1 image: 1"),
    ({1: ["a"]}, {1: []}, NAMES, "at least one reference; none for 1 image: 1"),
  ],
)
def test_invalid_evaluations(candidates, references, metrics, words):
  with pytest.raises(ValueError, match=words):
    captioning.evaluate(candidates, references, metrics)


# Missing references.


def test_references_without_a_word_count_as_none():
  candidates = {1: ["a dog"], 2: ["two cats"]}
  values = captioning.evaluate(candidates, {1: ["", "a dog", "..."], 2: ["two cats"]})
  assert values == captioning.evaluate(candidates, {1: ["a dog"], 2: ["two cats"]})
  with pytest.raises(ValueError, match="at least one reference; none for 1 image: 2"):
    captioning.evaluate(candidates, {1: ["a dog"], 2: [" ", "!"]})


REFERENCES = st.dictionaries(
  st.integers(0, 9), st.lists(st.sampled_from(["", " ", "a", "a dog"]), max_size=3), max_size=5
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(REFERENCES)
def test_every_reference_is_kept_or_counted(references):
  kept, sentences = captioning.without_empty(references, lambda image: f"image {image}")
  total = sum(map(len, references.values()))
  lost = total - sum(map(len, kept.values()))
  assert all(text.strip() for texts in kept.values() for text in texts)
  counts = [sentence for sentence in sentences if "reference captions" in sentence]
  assert [c.split(" have ")[0] for c in counts] == (
    [f"{lost} of {total} reference captions"] if lost else []
  )
  missing = len(references) - len(kept)
  assert any(s.startswith(f"{missing} of {len(references)} images") for s in sentences) == (
    missing > 0
  )


def test_a_note_says_where_cider_says_nothing():
  assert "from one image alone" in captioning.cider_note({1: ["a dog", "a cat"]})
  assert "tells the 2 images apart" in captioning.cider_note({1: ["a dog"], 2: ["a dog"]})
  assert captioning.cider_note({1: ["a dog"], 2: ["a cat"]}) == ""
  assert captioning.CiderD([["a dog"]]).score(["a dog"], [["a dog"]]) == 0


# The Java metrics.


def test_java_metrics_without_their_package_are_reported(monkeypatch):
  monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
  values = captioning.evaluate(
    {1: ["a dog"], 2: ["a cat"]}, {1: ["a dog"], 2: ["a cat"]}, ["METEOR", "ROUGE-L", "SPICE"]
  )
  assert values["ROUGE-L"] == pytest.approx(100)
  assert values["METEOR"].startswith("not computed: pycocoevalcap cannot be imported")
  assert values["SPICE"].startswith("not computed: pycocoevalcap cannot be imported")


class FakeMetric:
  """Replaces a wrapper of pycocoevalcap."""

  def compute_score(self, references, candidates):
    if candidates[0] == ["broken"]:
      raise OSError("no pipe")
    return 0.25, [0.25]


@pytest.fixture
def fake_package(monkeypatch, tmp_path):
  for name, method in (
    ("pycocoevalcap.meteor.meteor", "Meteor"),
    ("pycocoevalcap.spice.spice", "Spice"),
  ):
    module = type(sys)(name)
    module.__file__ = str(tmp_path / "spice.py")
    setattr(module, method, FakeMetric)
    for parent in ("pycocoevalcap", name.rpartition(".")[0]):
      monkeypatch.setitem(sys.modules, parent, type(sys)(parent))
    monkeypatch.setitem(sys.modules, name, module)
  monkeypatch.setattr(java_metrics.shutil, "which", lambda name: "/usr/bin/java")
  return tmp_path


def test_java_metrics_are_computed_if_everything_is_installed(fake_package):
  (fake_package / "lib").mkdir()
  for jar in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
    (fake_package / "lib" / jar).touch()
  assert captioning.evaluate({1: ["a"]}, {1: ["a"]}, ["METEOR", "SPICE"]) == {
    "METEOR": 25,
    "SPICE": 25,
  }


def test_spice_names_missing_models_and_downloads_nothing(fake_package):
  values = captioning.evaluate({1: ["a"]}, {1: ["a"]}, ["METEOR", "SPICE"])
  assert values["METEOR"] == 25
  assert "stanford-corenlp-3.6.0.jar" in values["SPICE"]


def test_failed_and_missing_java_is_no_failure(fake_package, monkeypatch):
  assert (
    captioning.evaluate({1: ["broken"]}, {1: ["a"]}, ["METEOR"])["METEOR"]
    == "not computed: Meteor failed (OSError: no pipe)"
  )
  monkeypatch.setattr(java_metrics.shutil, "which", lambda name: None)
  assert "java" in captioning.evaluate({1: ["a"]}, {1: ["a"]}, ["METEOR"])["METEOR"]
