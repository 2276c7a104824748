"""The report of the data check, and its printed lines."""

import dataclasses
from collections import Counter
from typing import NamedTuple

_NAMED = 10  # images, ids and the like that a report names


_COVERED = (10, 100, 1000)  # most frequent answers whose share is reported


PERCENTILES = (50, 90, 99)


class Lengths(NamedTuple):
  """Lengths of texts.

  Percentiles: those of PERCENTILES. limit: key of config.data, or "". over: texts beyond it.
  """

  percentiles: tuple
  longest: int
  limit: str = ""
  most: int = 0
  over: int = 0


@dataclasses.dataclass
class Texts:
  """The texts of one kind.

  Tokens: Lengths, None without a tokenizer. empty: without a word. lists: such as look like lists.
  """

  count: int
  words: Lengths
  tokens: Lengths | None
  empty: int
  lists: list


@dataclasses.dataclass
class Report:
  """What `check` found.

  See `lines`. errors: why training would fail. warnings: what it would put up with.
  """

  records: int
  entries: int
  entries_name: str
  images: int = 0
  missing: list = dataclasses.field(default_factory=list)  # names
  corrupt: list = dataclasses.field(default_factory=list)  # sentences
  ids: set | None = None  # as text; None if the data give none
  duplicate_ids: dict = dataclasses.field(default_factory=dict)  # id -> times
  texts: dict = dataclasses.field(default_factory=dict)  # kind -> Texts
  answers: Counter | None = None
  labels: Counter | None = None
  boxes: int = 0
  outside: list = dataclasses.field(
    default_factory=list
  )  # sentences, of boxes without a part in their image
  cut: int = 0  # boxes of which a part lies outside
  overlaps: dict = dataclasses.field(
    default_factory=dict
  )  # name -> (common images, common ids), sorted
  errors: list = dataclasses.field(default_factory=list)
  warnings: list = dataclasses.field(default_factory=list)
  samples: list = dataclasses.field(default_factory=list)  # Items for `write_sheet`


def examples_of(values, separator=", "):
  """The first values as text."""
  values = list(values)
  return separator.join(map(str, values[:_NAMED])) + f"{separator}..." * (len(values) > _NAMED)


def lines(report) -> list[str]:
  """A Report as lines of text, errors and warnings last."""
  unreadable = len(report.missing) + len(report.corrupt)
  out = [
    f"records   {report.records:,}"
    + f" with {report.entries:,} {report.entries_name}" * (report.entries != report.records),
    f"images    {report.images:,}: {report.images - unreadable:,} readable, "
    f"{len(report.missing):,} missing, "
    f"{len(report.corrupt):,} corrupt",
  ]
  out += [f"  missing: {name}" for name in report.missing[:_NAMED]]
  out += [f"  corrupt: {sentence}" for sentence in report.corrupt[:_NAMED]]
  out.append(
    "ids       none are given"
    if report.ids is None
    else f"ids       {len(report.ids):,} different, {len(report.duplicate_ids):,} of them more "
    f"than once" + f": {examples_of(report.duplicate_ids)}" * bool(report.duplicate_ids)
  )
  for kind, texts in report.texts.items():
    out.append(f"{kind:<9} {texts.count:,}, {texts.empty:,} empty")
    out += [
      f"  {unit:<8}{_length_line(found)}"
      for unit, found in (("words", texts.words), ("tokens", texts.tokens))
      if found
    ]
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
    out += [
      f"  {what}: {examples_of(found)}"
      for what, found in (("images", images), ("ids", ids))
      if found
    ]
  return (
    out
    + [f"warning: {text}" for text in report.warnings]
    + [f"error: {text}" for text in report.errors]
  )


def _length_line(found):
  text = (
    ", ".join(f"{p}% have at most {n}" for p, n in zip(PERCENTILES, found.percentiles))
    + f", the longest has {found.longest}"
  )
  return (
    text
    + f"; {found.over:,} exceed config.data.{found.limit}={found.most} and are cut"
    * bool(found.limit)
  )


def _shares(counts):
  total = counts.total()
  return examples_of(
    f"{name} {times:,} ({100 * times / total:.1f}%)" for name, times in counts.most_common()
  )
