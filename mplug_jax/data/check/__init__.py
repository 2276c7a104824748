"""Check of training data: `check` reads every record and opens every image.

The check reads through the source of the task, so it fails with the same messages as training.
Imports no JAX.
"""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from mplug_jax import data as data_lib
from mplug_jax.config import Config
from mplug_jax.data.check.image_check import is_path, open_images
from mplug_jax.data.check.judge import judge
from mplug_jax.data.check.report import PERCENTILES, Lengths, Report, Texts
from mplug_jax.data.check.sheet import SHEET_IMAGES
from mplug_jax.data.errors import noted
from mplug_jax.data.examples.record_view import Item, Limit, Text, View
from mplug_jax.data.text.tokenizer_base import Tokenizer


def check(
  config: Config,
  split: str = "train",
  tokenizer: Tokenizer | None = None,
  against: Iterable[tuple[str, Config, str]] = (),
  limit: int = 0,
  threads: int = 0,
) -> Report:
  """Reads the records of a split and opens their images, each once.

  Generated images are kept in memory: set a limit.

  Args:
    config: config with the data.
    split: "train", "val" or "test".
    tokenizer: measures texts in tokens too, if it is given.
    against: (name, config, split) of other data that should share no image and no id.
    limit: largest number of records, evenly spaced; 0 = all.
    threads: number of threads that open images; 0 = one per core.

  Raises:
    ValueError: as the source, for data that cannot be read at all; or the task has no check.
    FileNotFoundError: as the source.
  """
  data = config.data
  view = _view(config)
  with noted() as notes:
    source = view.source(data, split)
    numbers = range(0, len(source), max(1, -(-len(source) // limit)) if limit else 1)
    items = [view.item(source[number], data) for number in numbers]
  ids = [str(number) for item in items for number in item.ids]
  report = Report(len(items), len(ids) or len(items), view.entries, warnings=notes)
  report.ids = None if _are_numbers(ids, numbers) else set(ids)
  report.duplicate_ids = {number: times for number, times in Counter(ids).items() if times > 1}
  prefix = view.prefix(config, tokenizer) if tokenizer else ""
  for kind, token_limit in view.limits.items():
    texts = [text for item in items for text in item.texts if text.kind == kind]
    if texts:
      report.texts[kind] = _measure(texts, data, tokenizer, prefix, token_limit)
  if any(item.answers for item in items):
    report.answers = Counter(
      answer for item in items for answers in item.answers for answer in answers
    )
  if any(item.label for item in items):
    report.labels = Counter(item.label for item in items if item.label)
  unreadable = open_images(report, items, data, threads or os.cpu_count() or 1)
  report.samples = _samples(items, unreadable)
  paths = {image for item in items for image in item.images if is_path(image)}
  for name, other, other_split in against:
    report.overlaps[name] = _overlap(paths, report.ids, other, other_split)
  judge(report, items, data, split)
  return report


def _view(config: Config) -> View:
  """Returns the VIEW of config.data.examples."""
  module = data_lib.examples_module(config)
  if not hasattr(module, "VIEW"):
    raise ValueError(
      f"Data for config.data.examples={config.data.examples!r} cannot be checked: module "
      f"{module.__name__} defines no VIEW."
    )
  return module.VIEW


def _are_numbers(ids: list[str], numbers: Iterable[int]) -> bool:
  """Returns whether ids are the numbers of records or entries.

  Sources give these numbers if the data have no ids.
  """
  return ids in (list(map(str, range(len(ids)))), list(map(str, numbers)))


def _samples(items: list[Item], unreadable: set[Any]) -> list[Item]:
  """Returns items with readable images, evenly spaced.

  The texts of one image are shown together, unless they have boxes.
  """
  by_image: dict[Any, Item] = {}
  for item in items:
    if not any(not isinstance(image, np.ndarray) and image in unreadable for image in item.images):
      key = item.boxes, *(image if is_path(image) else id(image) for image in item.images)
      first = by_image.setdefault(key, item._replace(shown=[]))
      first.shown.extend(item.shown)
  readable = list(by_image.values())
  count = min(len(readable), SHEET_IMAGES)
  return [readable[i] for i in np.linspace(0, len(readable) - 1, count).astype(int)]


def _measure(
  texts: list[Text], data: Config, tokenizer: Tokenizer | None, prefix: str, limit: Limit
) -> Texts:
  """Measures texts of one kind in words and tokens."""
  words = _lengths(
    [len(text.text.split()) for text in texts], data, "max_words" if "max_words" in data else ""
  )
  tokens = None
  if tokenizer:
    rows = [tokenizer.encode(prefix + text.encoded) for text in texts]
    counts = [len(row) + (limit.ends and row[-1] != tokenizer.eos_id) for row in rows]
    tokens = _lengths(counts, data, limit.key)
  lists = [text.text for text in texts if text.text[:1] + text.text[-1:] in ("[]", "{}")]
  return Texts(len(texts), words, tokens, sum(not text.text.strip() for text in texts), lists)


def _lengths(counts: list[int], data: Config, key: str) -> Lengths:
  """Returns the distribution of lengths, and how many exceed config.data[key]."""
  lengths = np.array(counts)
  shares = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
  percentiles = tuple(int(x) for x in shares)
  if not key:
    return Lengths(percentiles, int(lengths.max()))
  return Lengths(percentiles, int(lengths.max()), key, data[key], int((lengths > data[key]).sum()))


def _overlap(
  paths: set[Any], ids: set[str] | None, config: Config, split: str
) -> tuple[list[str], list[str]]:
  """Returns (images, ids) that other data have too, sorted."""
  view = _view(config)
  source = view.source(config.data, split)
  others = [view.item(source[number], config.data) for number in range(len(source))]
  other_ids = [str(number) for item in others for number in item.ids]
  other_paths = {image for item in others for image in item.images if is_path(image)}
  common = sorted(map(str, paths & other_paths))
  if ids is None or _are_numbers(other_ids, range(len(others))):
    return common, []
  return common, sorted(ids & set(other_ids))
