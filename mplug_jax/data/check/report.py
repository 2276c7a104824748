"""The report of the data check, and its printed lines."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from mplug_jax.data.check.box_units import PlacedBox
from mplug_jax.data.examples.record_view import Item

PERCENTILES = (50, 90, 99)
_NAMED = 10  # largest number of images, ids, ... that a line names
_COVERED = (10, 100, 1000)  # numbers of most frequent answers whose share is reported


class Lengths(NamedTuple):
  """Lengths of texts.

  Attributes:
    percentiles: at PERCENTILES.
    longest: largest length.
    limit: key of config.data, or "".
    most: value of the limit.
    over: number of texts that exceed the limit.
  """

  percentiles: tuple[int, ...]
  longest: int
  limit: str = ""
  most: int = 0
  over: int = 0


@dataclasses.dataclass
class Texts:
  """Texts of one kind.

  Attributes:
    count: number of texts.
    words: lengths in words.
    tokens: lengths in tokens, None without a tokenizer.
    empty: number of texts without a word.
    lists: texts that look like lists.
  """

  count: int
  words: Lengths
  tokens: Lengths | None
  empty: int
  lists: list[str]


@dataclasses.dataclass
class Report:
  """Result of `check`; see `lines`.

  Attributes:
    records: number of records.
    entries: number of entries in the records.
    entries_name: name of the entries, in the plural.
    images: number of images.
    missing: names of missing images.
    corrupt: a sentence per unreadable image.
    ids: ids as text; None if the data have none.
    duplicate_ids: {id: number of times} of ids that occur more than once.
    texts: {kind: Texts}.
    answers: number of times of each answer.
    labels: number of records of each label.
    boxes: number of boxes.
    outside: a sentence per box that is completely outside its image.
    placed: boxes of readable images.
    values: {kind of image_values: (name, largest value) of its images}.
    cut: number of boxes that are partly outside their image.
    overlaps: {name: (common images, common ids)}, sorted.
    errors: reasons why training would fail.
    warnings: problems that training tolerates.
    samples: items for `write_sheet`.
  """

  records: int
  entries: int
  entries_name: str
  images: int = 0
  missing: list[str] = dataclasses.field(default_factory=list)
  corrupt: list[str] = dataclasses.field(default_factory=list)
  ids: set[str] | None = None
  duplicate_ids: dict[str, int] = dataclasses.field(default_factory=dict)
  texts: dict[str, Texts] = dataclasses.field(default_factory=dict)
  answers: Counter | None = None
  labels: Counter | None = None
  boxes: int = 0
  outside: list[str] = dataclasses.field(default_factory=list)
  placed: list[PlacedBox] = dataclasses.field(default_factory=list)
  values: dict[str, list[tuple[str, int]]] = dataclasses.field(default_factory=dict)
  cut: int = 0
  overlaps: dict[str, tuple[list[str], list[str]]] = dataclasses.field(default_factory=dict)
  errors: list[str] = dataclasses.field(default_factory=list)
  warnings: list[str] = dataclasses.field(default_factory=list)
  samples: list[Item] = dataclasses.field(default_factory=list)


def examples_of(values: Iterable[object], separator: str = ", ") -> str:
  """Returns the first values as text.

  Args:
    values: any values.
    separator: text between values.
  """
  texts = list(map(str, values))
  if len(texts) > _NAMED:
    texts = [*texts[:_NAMED], "..."]
  return separator.join(texts)


def lines(report: Report) -> list[str]:
  """Returns a report as lines of text, warnings and errors last.

  Args:
    report: result of `check`.
  """
  out = _count_lines(report)
  for kind, texts in report.texts.items():
    out.append(f"{kind:<9} {texts.count:,}, {texts.empty:,} empty")
    out.append(f"  words   {_length_line(texts.words)}")
    if texts.tokens:
      out.append(f"  tokens  {_length_line(texts.tokens)}")
  if report.answers:
    total = report.answers.total()
    shares = (sum(times for _, times in report.answers.most_common(n)) / total for n in _COVERED)
    out.append(
      f"answers   {len(report.answers):,} different; of all given, the most frequent "
      + ", ".join(f"{n:,} make up {100 * share:.1f}%" for n, share in zip(_COVERED, shares))
    )
    out.append(f"  {_shares(report.answers)}")
  if report.labels:
    out.append(f"labels    {_shares(report.labels)}")
  if report.boxes:
    out.append(
      f"boxes     {report.boxes:,}: {len(report.outside):,} outside their image, {report.cut:,} "
      f"reaching beyond it"
    )
  for name, (images, ids) in report.overlaps.items():
    out.append(f"shared with {name}: {len(images):,} images, {len(ids):,} ids")
    if images:
      out.append(f"  images: {examples_of(images)}")
    if ids:
      out.append(f"  ids: {examples_of(ids)}")
  out += [f"warning: {text}" for text in report.warnings]
  return out + [f"error: {text}" for text in report.errors]


def _count_lines(report: Report) -> list[str]:
  """Returns the lines about records, images and ids."""
  records = f"records   {report.records:,}"
  if report.entries != report.records:
    records += f" with {report.entries:,} {report.entries_name}"
  readable = report.images - len(report.missing) - len(report.corrupt)
  out = [
    records,
    f"images    {report.images:,}: {readable:,} readable, {len(report.missing):,} missing, "
    f"{len(report.corrupt):,} corrupt",
  ]
  out += [f"  missing: {name}" for name in report.missing[:_NAMED]]
  out += [f"  corrupt: {sentence}" for sentence in report.corrupt[:_NAMED]]
  if report.ids is None:
    return [*out, "ids       none are given"]
  duplicates = len(report.duplicate_ids)
  ids = f"ids       {len(report.ids):,} different, {duplicates:,} of them more than once"
  if report.duplicate_ids:
    ids += f": {examples_of(report.duplicate_ids)}"
  return [*out, ids]


def _length_line(lengths: Lengths) -> str:
  text = ", ".join(f"{p}% have at most {n}" for p, n in zip(PERCENTILES, lengths.percentiles))
  text += f", the longest has {lengths.longest}"
  if lengths.limit:
    text += f"; {lengths.over:,} exceed config.data.{lengths.limit}={lengths.most} and are cut"
  return text


def _shares(counts: Counter) -> str:
  total = counts.total()
  return examples_of(
    f"{name} {times:,} ({100 * times / total:.1f}%)" for name, times in counts.most_common()
  )
