"""The tiny captioning run of the tests: configs, tokenizer, batches and official files."""

import json
import re
import runpy

import numpy as np
from PIL import Image

from mplug_jax import data
from mplug_jax.data import pipeline
from mplug_jax.data.text import sentencepiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.scenes import scene as scenes
from mplug_jax.scenes import text as scene_text
from tests.support import tiny_run, word_list

# Runs with these settings share one build (tests/support/shared_builds.py), whatever they read.
_RUN = {
  "compilation_cache": "",
  "log_every": 1,
  "total_steps": 2,
  "optim__schedule__name": "constant",
  "task__beams": 1,
  "task__max_length": 8,
  "model__image_size": 48,
  "data__captions_per_image": 2,
  "data__max_caption": 12,
  "tokenizer__kind": "wordpiece",
}
_SCENES = scenes.SceneConfig()


def run_settings(folder):
  """Returns the settings of a short run; its vocabulary, words of scenes, is put into `folder`."""
  captions = [
    text for i in range(40) for text in scene_text.captions(scenes.scene(_SCENES, "train", i))
  ]
  path = folder / "words_of_scenes.txt"
  path.write_text(word_list.text(*sorted(set(re.findall("[a-z]+", " ".join(captions))))))
  return _RUN | {"tokenizer__path": str(path)}


def config(arg="tiny", file="caption", **changes):
  """configs/<file>.py with `arg`, scenes at 48 pixels if it reads scenes.

  `changes` are written section__field=value.
  """
  c = runpy.run_path(str(tiny_run.ROOT / "configs" / f"{file}.py"))["get_config"](arg)
  if c.data.name == "scenes":
    c.data.size, c.model.image_size = 48, 48
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return c


def tokenizer(folder, c):
  """A SentencePiece model fitted to the training captions, in `folder`."""
  if c.data.name == "scenes":
    c.tokenizer.records = 100  # they have all words
  sentencepiece.train_sentencepiece(
    data.texts(c, data.get_source(c, "train")), c.tokenizer.vocab_size, folder
  )
  return tokenizer_lib.load(folder)


def batch(c, tokenizer, step=0):
  """A training batch, numpy."""
  source = data.get_source(c, "train")
  batches = pipeline.train_batches(
    source,
    data.make_transform(c, tokenizer, train=True),
    batch_size=c.batch_size,
    seed=c.seed,
    start_step=step,
    threads=0,
  )
  out = {k: np.array(v) for k, v in next(batches).items()}
  batches.close()
  return out


def stack(c, tokenizer, records):
  """Records -> a batch of numpy arrays as evaluation makes it."""
  transform = data.make_transform(c, tokenizer, train=False)
  examples = [transform(i, record, None) | {"mask": np.True_} for i, record in enumerate(records)]
  return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


CAPTIONS = (
  "A red dog, on a sign.",
  "Two cats.",
  "a blue sign stop",
  "the dog is on the cat",
  "a green cat",
)


def write_karpathy(folder):
  """Five images in the official layout: three to train on, one each to validate and test.

  Their captions begin one further on each.
  """
  splits, entries = ("train", "train", "train", "val", "test"), {"train": [], "val": [], "test": []}
  for number, split in enumerate(splits):
    name, filepath = (
      f"COCO_{'train' if number < 2 else 'val'}2014_{number + 7:012d}.jpg",
      "train2014" if number < 2 else "val2014",
    )
    path = folder / f"{filepath}_img" / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)).save(
      path
    )
    texts = [CAPTIONS[(number + i) % 5] for i in range(2 + number % 2)]
    entries[split].append(
      {
        "filename": name,
        "filepath": filepath,
        "object_label": "dog&&cat",
        "sentences": [{"raw": t} for t in texts],
      }
    )
  for split, rows in entries.items():
    (folder / f"caption_{split}.json").write_text(json.dumps(rows))
  return folder
