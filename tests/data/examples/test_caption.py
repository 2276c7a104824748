"""Captioning records of every source, and examples against literal tokens."""

import importlib
import json

import ml_collections
import numpy as np
import pytest

from mplug_jax import data as data_lib
from mplug_jax.data.examples import caption
from mplug_jax.data.images import reader
from mplug_jax.data.sources import caption as caption_lib
from mplug_jax.data.sources.chunked import Chunked
from mplug_jax.data.text import sentencepiece
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


def test_scene_tokenizers_cover_the_words_of_all_tasks(tmp_path):
  """A run can therefore start from a run of another task."""
  fingerprints = set()
  for name, text in (
    ("caption", "a drawing of a tiny disc"),
    ("nlvr2", "exactly one of the two images shows"),
    ("vqa", "what is bottommost"),
  ):
    c = importlib.import_module(f"configs.{name}").get_config("small,data=scenes")
    tokenizer = sentencepiece.train_sentencepiece(
      data_lib.texts(c, None), c.tokenizer.vocab_size, tmp_path / name
    )
    fingerprints.add(tokenizer.fingerprint)
    assert len(tokenizer.encode(text)) == 1 + len(text.split())
  assert len(fingerprints) == 1


def test_official_recipe_has_a_record_per_sentence(tmp_path):
  c = caption_run.config(f"base,data=karpathy,root={caption_run.write_karpathy(tmp_path)}")
  assert c.data.captions_per_image == 1
  assert len(data_lib.get_source(c, "train")) == 2 + 3 + 2


# ---- files


def test_the_official_format(tmp_path):
  c = caption_run.config(f"tiny,data=karpathy,root={caption_run.write_karpathy(tmp_path)}")
  train = caption_lib.images(c.data, "train")
  test = caption_lib.images(c.data, "test")
  assert [train[i]["image_id"] for i in range(3)] == [7, 8, 9]
  assert len(test) == 1
  assert test[0]["image_id"] == 11
  assert train.captions(0) == ["a red dog, on a sign.", "two cats."]
  assert train.counts().tolist() == [2, 3, 2]
  assert train.group(0) is None
  assert train[2]["image"] == str(tmp_path / "val2014_img" / "COCO_val2014_000000000009.jpg")
  (tmp_path / "val2014_img").rename(tmp_path / "val2014")
  assert caption_lib.images(c.data, "test")[0]["image"] == str(
    tmp_path / "val2014" / "COCO_val2014_000000000011.jpg"
  )


def test_one_file_of_all_splits(tmp_path):
  """Karpathy's file: "restval" is part of training."""
  caption_run.write_karpathy(tmp_path)
  entries = [
    entry
    for split in ("train", "val", "test")
    for entry in json.loads((tmp_path / f"caption_{split}.json").read_text())
  ]
  splits = ("train", "restval", "train", "val", "test")
  entries = [
    entry | {"split": split, "cocoid": 900 + i}
    for i, (entry, split) in enumerate(zip(entries, splits))
  ]
  (tmp_path / "all.json").write_text(json.dumps({"images": entries}))
  name = str(tmp_path / "all.json")
  c = caption_run.config(
    f"tiny,data=karpathy,root={tmp_path}",
    data__train_files=(name,),
    data__val_file=name,
    data__test_file=name,
  )
  image_ids = {
    split: [
      r["image_id"]
      for r in map(
        caption_lib.images(c.data, split).__getitem__, range(len(caption_lib.images(c.data, split)))
      )
    ]
    for split in ("train", "val", "test")
  }
  assert image_ids == {"train": [900, 901, 902], "val": [903], "test": [904]}


def test_nocaps_has_domains(tmp_path):
  (tmp_path / "images").mkdir()
  for name in ("a.jpg", "b.jpg"):
    (tmp_path / "images" / name).write_bytes(b"")
  content = {
    "images": [
      {"id": 3, "file_name": "a.jpg", "domain": "in-domain"},
      {"id": 4, "file_name": "b.jpg", "domain": "out-domain"},
    ],
    "annotations": [
      {"image_id": i, "caption": text} for i, text in ((4, "A cat"), (3, "A dog"), (4, "The cat"))
    ],
  }
  (tmp_path / "caption_val.json").write_text(json.dumps(content))
  c = caption_run.config(f"tiny,data=nocaps,root={tmp_path}")
  source = caption_lib.images(c.data, c.eval.split)
  assert [(source[i]["image_id"], source.captions(i), source.group(i)) for i in range(2)] == [
    (3, ["a dog"], "in-domain"),
    (4, ["a cat", "the cat"], "out-domain"),
  ]
  with pytest.raises(
    FileNotFoundError, match="data.train_files names .*caption_train.json, which does not exist"
  ):
    caption_lib.images(c.data, "train")


def test_jsonl_lines_of_one_image_are_grouped(tmp_path):
  (tmp_path / "a.png").write_bytes(b"")
  lines = [
    {"image": "a.png", "caption": "One Dog"},
    {"image": "a.png", "caption": ["a dog", "A DOG"]},
    {"image": "a.png", "image_id": "x", "caption": "no cat"},
  ]
  (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
  source = caption_lib.images(caption_run.config(f"tiny,data=jsonl,root={tmp_path}").data, "train")
  assert [(source[i]["image_id"], source.captions(i)) for i in range(len(source))] == [
    ("a.png", ["one dog", "a dog", "a dog"]),
    ("x", ["no cat"]),
  ]


def test_a_folder_of_images_and_caption_files(tmp_path):
  for name in ("train/b.JPG", "train/deep/a.png", "train/c.txt", "train/notes.md", "val/x.webp"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  (tmp_path / "train/b.txt").write_bytes("\ufeffA Dog, é \r\n\r\n two dogs".encode())
  (tmp_path / "train/deep/a.txt").write_text("A cat\n")
  c = caption_run.config(f"tiny,data=folder:{tmp_path}")
  source = data_lib.get_source(c, "train").source
  assert [
    (source[i]["image"], source[i]["image_id"], source.captions(i)) for i in range(len(source))
  ] == [
    (f"{tmp_path}/{name}", name, captions)
    for name, captions in (
      ("train/b.JPG", ["a dog, é", "two dogs"]),
      ("train/deep/a.png", ["a cat"]),
    )
  ]
  for name in ("retrieval", "pretrain"):
    config = importlib.import_module(f"configs.{name}").get_config(f"data=folder:{tmp_path}")
    pairs = data_lib.get_source(config, "train")
    assert [pairs[i]["caption"] for i in range(len(pairs))] == ["a dog, é", "two dogs", "a cat"]
  assert caption_lib.images(c.data, "val").counts().tolist() == [0]
  (tmp_path / "train/deep/a.txt").unlink()
  with pytest.raises(
    ValueError, match="train/deep/a.png: there is no caption; a training image needs at least one"
  ):
    caption_lib.images(c.data, "train")
  with pytest.raises(
    FileNotFoundError,
    match=f"{tmp_path}/test does not exist or is not a folder; source folder reads the images",
  ):
    caption_lib.images(c.data, "test")
  (tmp_path / "test").mkdir()
  with pytest.raises(
    ValueError, match=f"{tmp_path}/test holds no image whose name ends with .jpg, "
  ):
    caption_lib.images(c.data, "test")
  with pytest.raises(
    ValueError,
    match="data.image_root is not set; source folder reads its folders train, val and test",
  ):
    caption_lib.images(caption_run.config("tiny,data=folder").data, "train")


GOOD = {"filename": "a.png", "filepath": "", "sentences": [{"raw": "a dog"}]}


@pytest.mark.parametrize(
  ("name", "entry", "message"),
  [
    ("karpathy", {"filepath": "x"}, "entry 2: key 'filename' is missing"),
    (
      "karpathy",
      GOOD | {"sentences": "a dog"},
      "entry 2: sentences must be a list of objects with 'raw'",
    ),
    (
      "karpathy",
      GOOD | {"sentences": [{"text": "a dog"}]},
      "entry 2, sentences: key 'raw' is missing",
    ),
    ("karpathy", GOOD | {"sentences": [{"raw": 3}]}, "entry 2: every caption must be a string"),
    (
      "karpathy",
      GOOD | {"sentences": []},
      "entry 2: there is no caption; a training image needs at least one",
    ),
    ("karpathy", GOOD | {"filename": "b.png"}, "b.png does not exist; check data.image_root"),
    (
      "jsonl",
      {"image": "a.png", "caption": 3},
      "line 2: caption must be a string or a list of strings",
    ),
    ("jsonl", {"caption": "a dog"}, "line 2: key 'image' is missing"),
  ],
)
def test_a_wrong_entry_is_located(tmp_path, name, entry, message):
  (tmp_path / "a.png").write_bytes(b"")
  if name == "karpathy":
    (tmp_path / "caption_train.json").write_text(json.dumps([GOOD, entry]))
  else:
    (tmp_path / "train.jsonl").write_text(
      "\n".join(map(json.dumps, [{"image": "a.png", "caption": "a dog"}, entry]))
    )
  c = caption_run.config(f"tiny,data={name},root={tmp_path}")
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    caption_lib.images(c.data, "train")
  assert "\n" not in str(error.value)


def test_an_annotation_without_an_image_is_located(tmp_path):
  (tmp_path / "caption_val.json").write_text(
    json.dumps({"images": [], "annotations": [{"image_id": 4, "caption": "a cat"}]})
  )
  with pytest.raises(
    ValueError, match="caption_val.json, annotation 1: no image of the file has id 4"
  ):
    caption_lib.images(caption_run.config(f"tiny,data=nocaps,root={tmp_path}").data, "val")


def test_unknown_names_are_errors():
  c = caption_run.config()
  with pytest.raises(
    ValueError, match="Split 'tset' does not exist; known splits: train, val, test"
  ):
    caption_lib.images(c.data, "tset")
  c.data.name = "coco"
  with pytest.raises(
    ValueError,
    match="data.name is 'coco'; known sources of captions: scenes, karpathy, nocaps, jsonl",
  ):
    caption_lib.images(c.data, "train")
  with pytest.raises(ValueError, match="data.captions_per_image=0 must be at least 1"):
    data_lib.get_source(caption_run.config(data__captions_per_image=0), "train")
  with pytest.raises(
    ValueError, match="data='coco' is unknown; there are scenes, karpathy, nocaps, jsonl"
  ):
    caption_run.config("tiny,data=coco")


def test_records_go_through_the_pipeline(tmp_path):
  c = caption_run.config()
  tokenizer = caption_run.tokenizer(tmp_path, c)
  batch = caption_run.batch(c, tokenizer)
  assert batch["caption"].shape == (8, 5, 32)
  assert batch["caption_valid"].all()
  assert batch["mask"].all()
  row = batch["caption"][3, 2]
  assert row[0] == tokenizer.bos_id
  assert (row == tokenizer.eos_id).sum() == 1
  assert (
    tokenizer.decode(row) == data_lib.get_source(c, "train").captions(int(batch["index"][3]))[2]
  )
