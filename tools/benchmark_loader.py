"""Data loading speed from JPEG files: this pipeline and a PyTorch DataLoader with torchvision.

Both decode, crop at random, resize (bicubic), mirror, apply RandAugment (2 operations, magnitude 7)
and tokenize a caption, with the same files and number of worker processes, in alternation.
PyTorch's transforms end with normalized floats; here the device normalizes. Needs torch and
torchvision.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from configs import retrieval as retrieval_config
from mplug_jax import data
from mplug_jax.data import pipeline
from mplug_jax.data.images import ops
from mplug_jax.data.text import tokenizer_base, wordpiece

IMAGES = 256
WIDTH = 640
HEIGHT = 480
SIZES = (224, 384)  # pixels
WORKERS = (1, 2)
BATCH = 32
WARM_UP = 4  # untimed batches, which start the processes and fill the caches
_WORDS = 12  # per caption

# An endless iterator of batches and the function that closes it.
Batches = tuple[Iterator[Any], Callable[[], None]]


def _write(folder: str, rng: np.random.Generator, vocabulary: Sequence[str]) -> None:
  """Writes train.jsonl and JPEG files of about 100 kB, as detailed as photographs."""
  with open(os.path.join(folder, "train.jsonl"), "w") as file:
    for number in range(IMAGES):
      coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
      )
      noise = rng.normal(0, 8, (HEIGHT, WIDTH, 1))
      pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
      Image.fromarray(pixels).save(os.path.join(folder, f"{number}.jpg"), quality=90)
      file.write(
        json.dumps({"image": f"{number}.jpg", "caption": " ".join(rng.choice(vocabulary, _WORDS))})
        + "\n"
      )


def _this_package(folder: str, vocab_file: str, size: int, workers: int) -> Batches:
  """Returns batches of this package's pipeline."""
  config = retrieval_config.get_config(f"base,data=jsonl,root={folder},res={size}")
  transform = data.make_transform(config, wordpiece.WordPieceTokenizer(vocab_file), train=True)
  batches = pipeline.train_batches(
    data.get_source(config, "train"), transform, batch_size=BATCH, seed=0, workers=workers
  )
  return batches, batches.close


def _pytorch(folder: str, vocab_file: str, size: int, workers: int) -> Batches:
  """Returns batches of a PyTorch DataLoader."""
  import tokenizers as hugging_face
  import torch  # pyright: ignore[reportMissingImports] (not a dependency)
  from torchvision import transforms  # pyright: ignore[reportMissingImports]

  torch.set_num_threads(1)
  transform = transforms.Compose(
    [
      transforms.RandomResizedCrop(
        size, scale=(0.5, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
      ),
      transforms.RandomHorizontalFlip(),
      transforms.RandAugment(2, 7),
      transforms.ToTensor(),
      transforms.Normalize(ops.MEAN.tolist(), ops.STD.tolist()),
    ]
  )
  tokenizer = hugging_face.BertWordPieceTokenizer(vocab_file)
  tokenizer.enable_truncation(30)
  tokenizer.enable_padding(length=30)
  with open(os.path.join(folder, "train.jsonl")) as file:
    rows = [json.loads(line) for line in file]

  class Pairs(torch.utils.data.Dataset):
    def __len__(self):
      return len(rows)

    def __getitem__(self, index):
      image = Image.open(os.path.join(folder, rows[index]["image"])).convert("RGB")
      return transform(image), torch.tensor(tokenizer.encode(rows[index]["caption"]).ids)

  loader = torch.utils.data.DataLoader(
    Pairs(), BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
  )

  def endless() -> Generator[Any, None, None]:
    while True:
      yield from loader

  batches = endless()
  return batches, batches.close


def _rate(make: Callable[..., Batches], *args: Any, batches: int) -> float:
  """Returns examples per second."""
  iterator, close = make(*args)
  for _ in range(WARM_UP):
    next(iterator)
  start = time.perf_counter()
  for _ in range(batches):
    next(iterator)
  seconds = time.perf_counter() - start
  close()
  return batches * BATCH / seconds


def loader(options: argparse.Namespace) -> dict[str, dict[str, float]]:
  """Compares both pipelines for all SIZES and WORKERS.

  Args:
    options: parsed command line; the rates are medians of options.repeats rounds.

  Returns:
    {"224 px, 1 worker": {"examples_per_second", "pytorch_examples_per_second", "ratio"}, ...}.
  """
  rng = np.random.default_rng(0)
  result = {}
  words = [f"word{i}" for i in range(500)]
  with tempfile.TemporaryDirectory() as folder:
    _write(folder, rng, words)
    vocab_file = os.path.join(folder, "vocab.txt")
    with open(vocab_file, "w") as file:
      file.write("\n".join([*tokenizer_base.SPECIAL_TOKENS, *words]))
    for size in SIZES:
      for workers in WORKERS:
        rates = [
          [
            _rate(make, folder, vocab_file, size, workers, batches=8 * workers)
            for make in (_this_package, _pytorch)
          ]
          for _ in range(options.repeats)
        ]
        rate, pytorch_rate = (statistics.median(column) for column in zip(*rates))
        plural = "s" if workers > 1 else ""
        result[f"{size} px, {workers} worker{plural}"] = {
          "examples_per_second": rate,
          "pytorch_examples_per_second": pytorch_rate,
          "ratio": statistics.median(a / b for a, b in rates),
        }
  return result
