"""Eight captioned pictures in the official retrieval format, and the tiny run on them."""

import importlib
import json

import numpy as np
from PIL import Image

from mplug_jax import data
from mplug_jax.data import pipeline
from mplug_jax.data.text import wordpiece
from mplug_jax.training import loop
from tests.support import tiny_run, word_list

WORDS = ["red", "blue", "green", "cat", "dog", "bird", "tree", "house"]


def write(folder):
  """Images, coco_{train,val,test}.json and vocab.txt.

  `val` has a second caption for every other picture.
  """
  rng = np.random.default_rng(0)
  (folder / "pictures").mkdir()
  for i in range(8):
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((32, 32), Image.NEAREST).save(
      folder / f"pictures/{i}.png"
    )

  def text(i, last=""):
    return f"A {WORDS[i % 3]} {WORDS[3 + i % 5]}{last}."

  images = [f"pictures/{i}.png" for i in range(8)]
  rows = {
    "train": [
      {"image": name, "caption": text(i), "image_id": f"coco_{i}"} for i, name in enumerate(images)
    ],
    "val": [
      {"image": name, "caption": [text(i), text(i, " here")][: 1 + i % 2]}
      for i, name in enumerate(images)
    ],
    "test": [{"image": name, "caption": [text(i)]} for i, name in enumerate(images)],
  }
  for split, entries in rows.items():
    (folder / f"coco_{split}.json").write_text(json.dumps(entries))
  (folder / "vocab.txt").write_text(word_list.text("a", "here", *WORDS))
  return folder


def config(arg="tiny", name="retrieval", **changes):
  """configs/`name`.py with `arg`; `changes` are written section__field=value."""
  c = importlib.import_module(f"configs.{name}").get_config(arg)
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return c


def files_config(folder, name="retrieval", **changes):
  """The tiny preset of configs/`name`.py on the files of `write`."""
  return config(
    f"tiny,data={'coco' if name == 'retrieval' else 'files'},root={folder}",
    name,
    **{
      "tokenizer__kind": "wordpiece",
      "tokenizer__path": str(folder / "vocab.txt"),
      "compilation_cache": "",
      "data__max_caption": 6,
      "data__augment__scale": (1.0, 1.0),
      **changes,
    },
  )


def tokenizer(folder):
  return wordpiece.WordPieceTokenizer(folder / "vocab.txt")


def first_batch(c, tokenizer, split="train"):
  """The first training batch, numpy."""
  batches = pipeline.train_batches(
    data.get_source(c, split),
    data.make_transform(c, tokenizer, train=True),
    batch_size=c.batch_size,
    seed=c.seed,
    threads=0,
  )
  out = {k: np.array(v) for k, v in next(batches).items()}
  batches.close()
  return out


def built(c, tokenizer, devices, steps=1000):
  return loop.build(c, tokenizer, steps, steps, devices)


def steady_config(folder, **changes):
  """Returns `files_config` without dropout.

  Initialized widely, so that every attention and every gradient matters; at 0.02 the softmaxes are
  uniform.
  """
  steady = tiny_run.NO_DROPOUT | {
    "model__initializer_range": 0.1,
    "task__negatives__group": 4,
  }
  return files_config(folder, **steady | changes)
