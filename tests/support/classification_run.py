"""The tiny classification run of the tests: configs, tokenizer, batches and official files."""

import json
import runpy

import numpy as np
from PIL import Image

from mplug_jax import data
from mplug_jax.data.text import sentencepiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from tests.support import tiny_run, word_list

WORDS = [
  "a",
  "the",
  "red",
  "green",
  "cat",
  "dog",
  "is",
  "on",
  "left",
  "right",
  "of",
  "image",
  "shows",
  "one",
  "both",
]


def config(file, arg="tiny", **changes):
  """configs/<file>.py with `arg`, scenes at 48 pixels if it reads scenes.

  `changes` are written section__field=value.
  """
  c = runpy.run_path(str(tiny_run.ROOT / "configs" / f"{file}.py"))["get_config"](arg)
  if "scene" in c.data.name:
    c.data.size = c.model.image_size = 48
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return c


def tokenizer(folder, c):
  """A SentencePiece model fitted to some training sentences, in `folder`."""
  c.tokenizer.records = 100  # they have all words
  sentencepiece.train_sentencepiece(
    data.texts(c, data.get_source(c, "train")), c.tokenizer.vocab_size, folder
  )
  return tokenizer_lib.load(folder)


def stack(c, tokenizer, records):
  """Records -> a batch of numpy arrays as evaluation makes it."""
  transform = data.make_transform(c, tokenizer, train=False)
  examples = [transform(i, record, None) | {"mask": np.True_} for i, record in enumerate(records)]
  return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def write_image(path, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20 + seed, 24, 3), np.uint8)).save(
    path
  )


def write_nlvr2(folder):
  """Three files in the official format with nine statements each, and vocab.txt."""
  for split, prefix in (("train", "images/train/7/"), ("dev", "dev/"), ("test", "test/")):
    rows = []
    for number in range(9):
      names = [f"{prefix}{split}-{number}-img{side}.png" for side in (0, 1)]
      for side, name in enumerate(names):
        write_image(folder / (f"train/{name.split('/')[-1]}" if split == "train" else name), side)
      rows.append(
        {
          "sentence": f"The left image shows a {'red' if number % 2 else 'green'} cat.",
          "images": names,
          "label": "True" if number % 3 else "False",
        }
      )
    (folder / f"nlvr_{split}.json").write_text(json.dumps(rows))
  (folder / "vocab.txt").write_text(word_list.text(*WORDS))
  return folder
