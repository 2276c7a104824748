"""Caption files: Karpathy splits, COCO, JSON lines."""

import importlib
import json

import pytest

from mplug_jax import data as data_lib
from mplug_jax.data.errors import RecordError
from mplug_jax.data.sources import caption as caption_lib
from tests.support import caption_run

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


def test_a_folder_of_images_and_caption_files(tmp_path, caplog):
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
  assert len(caption_lib.images(c.data, "train")) == 1  # without it
  assert (
    f"{tmp_path}/train/deep/a.png: there is no caption; a training image needs at least one. It is "
    "left out."
  ) in caplog.messages
  (tmp_path / "train/b.txt").unlink()
  with pytest.raises(
    ValueError, match="train/b.JPG: there is no caption; .* None of the entries can be used"
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
  ("captions", "problem"), [([], "there is no caption"), (["", " "], "the caption is empty")]
)
def test_a_training_image_without_a_caption_is_counted_and_named(
  tmp_path, caplog, captions, problem
):
  (tmp_path / "a.png").write_bytes(b"")
  bad = GOOD | {"sentences": [{"raw": text} for text in captions], "filename": "b.png"}
  (tmp_path / "caption_train.json").write_text(json.dumps([GOOD, bad, GOOD]))
  c = caption_run.config(f"tiny,data=karpathy,root={tmp_path}", data__image_root=str(tmp_path))
  source = caption_lib.images(c.data, "train")
  assert [source.captions(i) for i in range(len(source))] == [["a dog", "a dog"]]
  (message,) = caplog.messages
  assert message.startswith(f"{tmp_path}/caption_train.json, entry 2: {problem}; a training image")
  c.data.strict = True
  with pytest.raises(RecordError, match=f"entry 2: {problem}"):
    caption_lib.images(c.data, "train")
  (tmp_path / "caption_train.json").write_text(json.dumps([bad, bad]))
  c.data.strict = False
  with pytest.raises(ValueError, match=f"entry 1: {problem}; .* None of the entries of"):
    caption_lib.images(c.data, "train")


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
