"""The stream of training examples from files and augmentation: resuming, damaged images."""

import itertools
import json
import logging

import numpy as np
import pytest
from PIL import Image

from mplug_jax import data
from mplug_jax.data import pipeline
from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import reader
from tests.support import retrieval_files, word_list

IMAGES = 13
STEPS = 30
BATCH = 8


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
  """(source, transform) of photographs with random crops, mirroring and RandAugment."""
  folder = tmp_path_factory.mktemp("stream")
  rng = np.random.default_rng(0)
  with (folder / "train.jsonl").open("w") as file:
    for number in range(IMAGES):
      Image.fromarray(rng.integers(0, 256, (30 + number, 40, 3), np.uint8)).save(
        folder / f"{number}.jpg"
      )
      captions = [f"picture {number}", f"number {number}"]
      file.write(json.dumps({"image": f"{number}.jpg", "caption": captions}) + "\n")
  (folder / "vocab.txt").write_text(word_list.text("picture", "number", *map(str, range(IMAGES))))
  c = retrieval_files.config(f"tiny,data=jsonl,root={folder}")
  c.data.augment.update({"scale": (0.4, 1.0), "flip": 0.5, "randaugment": (2, 7)})
  return data.get_source(c, "train"), data.make_transform(
    c, retrieval_files.tokenizer(folder), train=True
  )


def stream(examples, start, steps, processes=1, workers=0):
  """Global batches [start, start + steps), put together from those of every process."""
  parts = []
  for process in range(processes):
    batches = pipeline.train_batches(
      *examples,
      batch_size=BATCH,
      seed=5,
      start_step=start,
      process_index=process,
      process_count=processes,
      workers=workers,
    )
    parts.append([next(batches) for _ in range(steps)])
    batches.close()
  return [
    {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]


def test_resuming_anywhere_continues_the_stream(examples):
  """Records, captions and augmented pixels are equal for any number of processes and workers."""
  unbroken = stream(examples, 0, STEPS)
  rng = np.random.default_rng(1)
  pixels = np.concatenate([batch["image"] for batch in unbroken])
  different = np.unique(pixels.reshape(len(pixels), -1), axis=0)
  assert len(different) > 0.95 * len(pixels)  # augmentation differs at every visit
  for case in range(20):
    start = int(rng.integers(STEPS - 3))
    # Workers take seconds to start; test_pipeline.py has some for the rows of one process.
    processes, workers = (1, 2) if case == 0 else (int(rng.choice([1, 2, 4])), 0)
    for batch, expected in zip(stream(examples, start, 3, processes, workers), unbroken[start:]):
      assert batch.keys() == expected.keys()
      for key in batch:
        np.testing.assert_array_equal(
          batch[key],
          expected[key],
          err_msg=f"{key}, step {start}, {processes} processes, {workers} workers",
        )


def test_sharpness_overflow_is_an_option_of_every_config():
  picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
  different = {}
  for name in ("caption", "retrieval", "pretrain", "vqa", "snli_ve", "nlvr2"):
    c = retrieval_files.config("tiny", name)
    c.data.augment.update({"scale": (1.0, 1.0), "flip": 0.0, "randaugment": (2, 7)})
    c.model.image_size = 24
    views = []
    for wraps in (False, True):
      c.data.augment.sharpness_wraps = wraps
      views.append(
        [reader.reader(c)(picture, "x", np.random.default_rng(seed))[0] for seed in range(40)]
      )
    different[name] = sum(bool((a != b).any()) for a, b in zip(*views))
  assert set(different.values()) == {different["vqa"]}
  assert 0 < different["vqa"] < 15


def damaged(tmp_path, strict):
  """(source, transform) of 1,200 captions of 1,200 images, of which 12 are no images."""
  good = tmp_path / "good.png"
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(good)
  with (tmp_path / "train.jsonl").open("w") as file:
    for number in range(1200):
      name = tmp_path / f"{number}.png"
      name.write_bytes(b"damaged") if number % 100 == 7 else name.symlink_to(good)
      file.write(json.dumps({"image": name.name, "caption": "a picture"}) + "\n")
  (tmp_path / "vocab.txt").write_text(word_list.text("a", "picture"))
  c = retrieval_files.config(f"tiny,data=jsonl,root={tmp_path}", data__strict=strict)
  return data.get_source(c, "train"), data.make_transform(
    c, retrieval_files.tokenizer(tmp_path), train=True
  )


def test_damaged_images_are_counted_and_ten_are_named(tmp_path, caplog):
  caplog.set_level(logging.WARNING)
  batches = pipeline.train_batches(*damaged(tmp_path, strict=False), batch_size=100, seed=0)
  epoch = [next(batches) for _ in range(12)]
  batches.close()
  assert sum(int(batch["corrupt"].sum()) for batch in epoch) == 12
  assert sorted(np.concatenate([batch["index"][batch["corrupt"]] for batch in epoch])) == list(
    range(7, 1200, 100)
  )
  named = [
    record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()
  ]
  assert len(named) == len(set(named)) == 10
  assert all("not an image of a known format" in message for message in named)


def test_strict_stops_at_the_first_damaged_image(tmp_path):
  batches = pipeline.train_batches(*damaged(tmp_path, strict=True), batch_size=100, seed=0)
  with pytest.raises(
    ValueError,
    match=r"Record \d+ of the data cannot be used: Image .*07\.png cannot be read|Image .*/7\.png",
  ) as error:
    list(itertools.islice(batches, 12))
  assert isinstance(error.value.__cause__, ImageError)
  batches.close()
