"""Pairs of an image and a caption, from official files, user files and scenes."""

import json
import pickle

import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data.examples import retrieval
from tests.support import retrieval_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return retrieval_files.write(tmp_path_factory.mktemp("retrieval"))


def test_an_epoch_has_every_caption_once_with_its_image_number():
  c = retrieval_files.config("tiny", data__records=6)
  source = data.get_source(c, "train")
  pairs = [source[i] for i in range(len(source))]
  assert len(pairs) == 30
  assert [p["id"] for p in pairs] == np.repeat(range(6), 5).tolist()
  images = retrieval.get_images(c.data, "train")
  for pair in pairs:
    assert pair["image_id"] == f"train-{pair['id']}"
    assert np.array_equal(pair["image"], images[pair["id"]]["image"])
  assert [p["caption"] for p in pairs] == [text for i in range(6) for text in images.captions(i)]
  assert list(retrieval.texts(source)) == [p["caption"] for p in pairs]
  assert list(retrieval.texts(source, 2)) == images.captions(0) + images.captions(3)


def test_entries_of_one_image_share_its_number(tmp_path, folder):
  rows = [
    {"image": f"pictures/{i}.png", "caption": text, "image_id": i}
    for i, text in ((3, "One"), (5, "Two"), (3, "Three"))
  ]
  (tmp_path / "train.json").write_text(json.dumps(rows))
  c = retrieval_files.files_config(folder, data__train_files=(str(tmp_path / "train.json"),))
  source = data.get_source(c, "train")
  assert [(source[i]["id"], source[i]["caption"]) for i in range(3)] == [
    (0, "one"),
    (0, "three"),
    (1, "two"),
  ]


def test_evaluation_reads_lists_of_captions(folder):
  images = retrieval.get_images(retrieval_files.files_config(folder).data, "val")
  assert images.counts().tolist() == [1, 2] * 4
  assert images.captions(1) == [
    "a blue dog.",
    "a blue dog here.",
  ]


def test_jsonl_lines(tmp_path, folder):
  (tmp_path / "train.jsonl").write_text(
    '{"image": "0.png", "caption": ["Red", "Cat"]}\n\n{"image": "1.png", "caption": "Dog"}\n'
  )
  (tmp_path / "0.png").symlink_to(folder / "pictures/0.png")
  (tmp_path / "1.png").symlink_to(folder / "pictures/1.png")
  source = data.get_source(retrieval_files.config(f"tiny,data=jsonl,root={tmp_path}"), "train")
  assert [(source[i]["id"], source[i]["caption"]) for i in range(len(source))] == [
    (0, "red"),
    (0, "cat"),
    (1, "dog"),
  ]


def test_a_caption_becomes_a_row_of_clean_tokens(folder):
  tokenizer = retrieval_files.tokenizer(folder)
  rows = pickle.loads(pickle.dumps(retrieval.CaptionRows(tokenizer, 3, 5)))
  special = [tokenizer.bos_id, tokenizer.pad_id]
  red, cat, dog, bird = (tokenizer.encode(word)[1] for word in ("red", "cat", "dog", "bird"))
  assert rows("Red, CAT!").tolist() == [special[0], red, cat, special[1], special[1]]
  assert rows("").tolist() == [special[0]] + [special[1]] * 4
  assert rows("...").tolist() == rows("").tolist()
  assert rows("red cat dog bird").tolist() == [special[0], red, cat, dog, special[1]]  # three words
  assert retrieval.CaptionRows(tokenizer, 30, 3)("red cat dog bird").tolist() == [
    special[0],
    red,
    cat,
  ]


def test_an_unreadable_image_is_black_and_marked_corrupt(folder, tmp_path):
  c = retrieval_files.files_config(folder)
  transform = data.make_transform(c, retrieval_files.tokenizer(folder), train=True)
  (tmp_path / "bad.png").write_bytes(b"no image")
  record = {"image": str(tmp_path / "bad.png"), "image_id": "x", "id": 3, "caption": "red"}
  example = transform(5, record, None)
  assert example["corrupt"]
  assert not example["image"].any()
  assert example["id"] == 3
  assert example["index"] == 5


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    (
      [{"image": "pictures/0.png"}],
      "train.json, entry 1: key 'caption' is missing; it has image; name it with",
    ),
    (
      [{"image": "pictures/0.png", "caption": []}],
      "train.json, entry 1: there is no caption; a training image needs at least one",
    ),
    (
      [{"image": "pictures/0.png", "caption": [1]}],
      "train.json, entry 1: caption must be a string or a list of strings",
    ),
    (
      [
        {"image": "pictures/0.png", "caption": "a", "image_id": 1},
        {"image": "pictures/1.png", "caption": "b", "image_id": 1},
      ],
      "train.json, entry 2: image_id 1 is already that of .*0.png",
    ),
    (
      [{"image": "pictures/9.png", "caption": "a"}],
      "train.json, entry 1: image .*9.png does not exist; check data.image_root",
    ),
  ],
)
def test_a_wrong_entry_is_located(rows, message, tmp_path, folder):
  (tmp_path / "train.json").write_text(json.dumps(rows))
  c = retrieval_files.files_config(folder, data__train_files=(str(tmp_path / "train.json"),))
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    data.get_source(c, "train")


def test_images_to_evaluate_need_captions(tmp_path, folder):
  (tmp_path / "val.json").write_text(
    json.dumps([{"image": "pictures/0.png", "caption": "a"}, {"image": "pictures/1.png"}])
  )
  c = retrieval_files.files_config(folder, data__val_file=str(tmp_path / "val.json"))
  with pytest.raises(
    ValueError,
    match="Image 'pictures/1.png' of split 'val' has no captions, and retrieval needs at least "
    "one of each",
  ):
    retrieval.get_images(c.data, "val")


def test_an_unknown_source_is_a_config_error():
  with pytest.raises(
    ValueError, match="data='flickr' is unknown; there are scenes, coco, flickr30k, jsonl"
  ):
    retrieval_files.config("data=flickr")
