"""Captioning records of every source, and examples against literal tokens."""

import functools
import importlib

import ml_collections
import numpy as np
import pytest

from mplug_jax import data as data_lib
from mplug_jax.data.examples import caption
from mplug_jax.data.images import reader
from mplug_jax.data.sources import caption as caption_lib
from mplug_jax.data.sources.chunked import Chunked
from mplug_jax.data.text import sentencepiece
from mplug_jax.scenes import corpus
from tests.support import caption_run

WORDS = ["a", "dog", "cat", "picture", "of", "ofa", "red", "on", "sign"]
# Unlike BERT's, to catch numbers written into the code
PAD = 9
BOS = 7
EOS = 8


class WordTokenizer:
  """One token per word; ids from 100, except the special ones."""

  pad_id = PAD
  bos_id = BOS
  eos_id = EOS

  def encode(self, text):
    return [BOS, *ids(*text.split())]

  def decode(self, tokens):
    return " ".join(WORDS[i - 100] for i in tokens if i >= 100)


def ids(*words):
  return [100 + WORDS.index(word) for word in words]


def transform(count=2, length=6, prompt="", mode="standard", **options):
  config = ml_collections.ConfigDict(
    {"task": {"prompt": prompt, "prompt_mode": mode}, "data": {"max_caption": length}}
  )
  return caption.CaptionTransform(
    WordTokenizer(),
    reader.ImageReader(8, **options),
    caption.prompt(config, WordTokenizer()),
    captions_per_image=count,
    max_caption=length,
  )


def record(*captions):
  return {
    "image": np.arange(192, dtype=np.uint8).reshape(8, 8, 3),
    "image_id": 5,
    "captions": list(captions),
  }


# ---- examples


def test_example_of_one_record():
  example = transform(3)(4, record("a dog", "a red cat on a sign"), None)
  assert {key: (value.shape, value.dtype.name) for key, value in example.items()} == {
    "image": ((8, 8, 3), "uint8"),
    "caption": ((3, 6), "int32"),
    "caption_valid": ((3,), "bool"),
    "corrupt": ((), "bool"),
    "index": ((), "int32"),
  }
  np.testing.assert_array_equal(
    example["caption"],
    [[BOS, *ids("a", "dog"), EOS, PAD, PAD], [BOS, *ids("a", "red", "cat", "on"), EOS], [PAD] * 6],
  )
  np.testing.assert_array_equal(example["caption_valid"], [True, True, False])
  assert example["index"] == 4
  assert not example["corrupt"]


def test_an_empty_caption_is_only_the_end_token():
  np.testing.assert_array_equal(
    transform(1)(0, record(""), None)["caption"], [[BOS, EOS, PAD, PAD, PAD, PAD]]
  )


@pytest.mark.parametrize(
  ("mode", "row", "start"),
  [
    ("standard", ["a", "picture", "of", "a", "dog"], ["a", "picture", "of"]),
    ("official", ["a", "picture", "ofa", "dog"], ["a", "picture"]),
  ],
)
def test_prompt_starts_captions_and_generation(mode, row, start):
  make = transform(1, 8, "a picture of", mode)
  expected = [BOS, *ids(*row), EOS]
  np.testing.assert_array_equal(
    make(0, record("a dog"), None)["caption"], [expected + [PAD] * (8 - len(expected))]
  )
  config = ml_collections.ConfigDict(
    {"task": {"prompt": "a picture of", "prompt_mode": mode}, "data": {"max_caption": 8}}
  )
  prompt = caption.prompt(config, WordTokenizer())
  assert prompt.ids == (BOS, *ids("a", "picture", "of"))
  assert prompt.start == (BOS, *ids(*start))
  assert prompt.decoded == "a picture of"


def test_without_a_prompt_both_modes_start_with_bos():
  for mode in caption.PROMPT_MODES:
    config = ml_collections.ConfigDict(
      {"task": {"prompt": "", "prompt_mode": mode}, "data": {"max_caption": 8}}
    )
    assert caption.prompt(config, WordTokenizer()) == ("", (BOS,), (BOS,), "")


def test_invalid_prompts():
  with pytest.raises(
    ValueError, match=r"config.task.prompt_mode='glued' is not one of standard, official\."
  ):
    transform(mode="glued")
  with pytest.raises(
    ValueError,
    match=r"config.data.max_caption=4 leaves no room .* config.task.prompt take 4 tokens",
  ):
    transform(length=4, prompt="a picture of")


def test_an_unreadable_image_has_no_captions():
  example = transform()(0, {**record("a dog"), "image": b"broken"}, None)
  assert example["corrupt"]
  assert not example["caption_valid"].any()
  assert (example["caption"] == PAD).all()
  assert not example["image"].any()


# ---- records of training


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_caption_is_in_one_training_record(size):
  counts = [3, 1, 5, 2]
  texts = [[f"{i}-{n}" for n in range(count)] for i, count in enumerate(counts)]
  chunked = Chunked(
    caption_lib.CaptionRecords([record(*captions) for captions in texts]), size, "captions"
  )
  expected = [
    (i, captions[first : first + size])
    for i, captions in enumerate(texts)
    for first in range(0, len(captions), size)
  ]
  assert [(chunked.record[n], chunked[n]["captions"]) for n in range(len(chunked))] == expected
  assert [chunked.captions(n) for n in range(len(chunked))] == [part for _, part in expected]


def test_scenes_have_five_captions_and_groups():
  c = caption_run.config(data__records=0)
  train = data_lib.get_source(c, "train")
  test = caption_lib.images(c.data, "test")
  assert len(train) == 20_000
  assert len(train[7]["captions"]) == 5
  assert len(data_lib.get_source(caption_run.config(data__captions_per_image=1), "train")) == 5 * 64
  assert {test.group(i) for i in range(20)} == {"seen", "unseen"}
  assert all((test.group(i) == "unseen") == test[i]["unseen"] for i in range(5))
  assert all(test.another_caption(i) not in test.captions(i) for i in range(20))
  texts = list(caption.texts(data_lib.get_source(c, "train"), 8))
  assert len(texts) == 5 * 8
  assert all(isinstance(text, str) for text in texts)


def test_scene_tokenizers_cover_the_words_of_all_tasks(tmp_path, monkeypatch):
  """A run can therefore start from a run of another task."""
  # The configs ask for the texts of the same scenes, which take seconds to write.
  texts = functools.cache(lambda *args, texts=corpus.texts: tuple(texts(*args)))
  monkeypatch.setattr(corpus, "texts", texts)
  configs = [
    importlib.import_module(f"configs.{name}").get_config("small,data=scenes")
    for name in ("caption", "nlvr2", "vqa")
  ]
  fitted = {(c.tokenizer.vocab_size, data_lib.texts(c, None)) for c in configs}
  assert len(fitted) == 1  # what a tokenizer depends on
  tokenizer = sentencepiece.train_sentencepiece(
    data_lib.texts(configs[0], None), configs[0].tokenizer.vocab_size, tmp_path
  )
  for text in (
    "a drawing of a tiny disc",
    "exactly one of the two images shows",
    "what is bottommost",
  ):
    assert len(tokenizer.encode(text)) == 1 + len(text.split())


def test_official_recipe_has_a_record_per_sentence(tmp_path):
  c = caption_run.config(f"base,data=karpathy,root={caption_run.write_karpathy(tmp_path)}")
  assert c.data.captions_per_image == 1
  assert len(data_lib.get_source(c, "train")) == 2 + 3 + 2
