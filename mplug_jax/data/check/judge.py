"""Errors and warnings that follow from the counts of a report."""

from collections.abc import Sequence

from mplug_jax.config import Config
from mplug_jax.data.check import box_units, image_values
from mplug_jax.data.check.report import Report, examples_of
from mplug_jax.data.examples.record_view import Item

_SIZES = ("refcoco",)  # sources whose boxes are [x, y, width, height]


def judge(report: Report, items: Sequence[Item], data: Config, split: str) -> None:
  """Fills the errors and warnings of a report.

  Args:
    report: counts of the check.
    items: contents of the records.
    data: config.data.
    split: "train", "val" or "test"; only "train" needs every label.
  """
  report.warnings += plausibility(report, data)
  _judge_images(report, data)
  if split == "train":  # evaluation reads no tokens of answers
    _judge_answers(report, items, data.get("max_answers", 0))
  _judge_boxes(report, data)
  if report.duplicate_ids:
    report.warnings.append(f"{len(report.duplicate_ids)} ids occur more than once.")
  if report.labels and split == "train":
    unused = [label for label in data.labels if label not in report.labels]
    if unused:
      report.warnings.append(f"No record has the label {', '.join(unused)}.")
  _judge_texts(report)
  for name, (images, ids) in report.overlaps.items():
    if images or ids:
      report.warnings.append(f"{len(images)} images and {len(ids)} ids are in {name} too.")


def plausibility(report: Report, data: Config) -> list[str]:
  """Returns a sentence for each kind of implausible boxes and images.

  Args:
    report: counts of the check.
    data: config.data.
  """
  readable = report.images - len(report.missing) - len(report.corrupt)
  return [
    *box_units.warnings(report.placed, sizes=data.name in _SIZES),
    *image_values.warnings(report.values, readable),
  ]


def _judge_images(report: Report, data: Config) -> None:
  unreadable = len(report.missing) + len(report.corrupt)
  if not report.records:
    report.errors.append("There are no records.")
  elif unreadable == report.images:
    report.errors.append(f"None of the {report.images} images can be read.")
  elif unreadable and data.strict:
    report.errors.append(
      f"config.data.strict=True, and {unreadable} of {report.images} images cannot be read."
    )
  elif unreadable:
    report.warnings.append(
      f"{unreadable} of {report.images} images cannot be read; their texts would not count."
    )


def _judge_answers(report: Report, items: Sequence[Item], limit: int) -> None:
  exceeding = sum(len(set(answers)) > limit for item in items for answers in item.answers)
  if exceeding:
    report.errors.append(
      f"{exceeding} questions have more different answers than config.data.max_answers={limit}; "
      f"raise it."
    )


def _judge_boxes(report: Report, data: Config) -> None:
  if report.outside:
    outside = (
      f"{len(report.outside)} boxes lie outside their image: {examples_of(report.outside, '; ')}."
    )
    if data.strict:
      report.errors.append(f"config.data.strict=True, and {outside}")
    elif len(report.outside) == report.boxes:
      report.errors.append(f"All {outside}")
    else:
      report.warnings.append(f"{outside.removesuffix('.')}; their texts would not count.")
  if report.cut:
    report.warnings.append(
      f"{report.cut} of {report.boxes} boxes reach beyond their image; they would be cut there."
    )


def _judge_texts(report: Report) -> None:
  for kind, texts in report.texts.items():
    if texts.empty:
      report.warnings.append(f"{texts.empty} of {texts.count} {kind}s are empty.")
    if texts.lists:
      report.warnings.append(
        f"{len(texts.lists)} {kind}s look like lists, but are no valid JSON and so are text: "
        f"{texts.lists[0]!r}."
      )
