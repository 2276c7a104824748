"""What training would meet in its data: `check` reads every record and opens every image, `lines` says what it found.

It reads through the task's own source, so that whatever the source refuses is refused here with the
same sentence. Imports no JAX.
"""

import itertools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mplug_jax.data.check.report import PERCENTILES, Lengths, Report, Texts, examples_of
from mplug_jax.data.check.sheet import SHEET_IMAGES
from mplug_jax.data.check.views import VIEWS
from mplug_jax.data.errors import ImageError
from mplug_jax.data.examples import caption
from mplug_jax.data.images import ops, video
from mplug_jax.data.storage import archives

_AT_A_TIME = 1024  # images handed to the threads


def check(config, split="train", tokenizer=None, against=(), limit=0, threads=0) -> Report:
  """Reads the records of a split and opens their images, each once.

  Generated images are kept in memory: set a limit.

  Args:
    tokenizer: to measure texts in tokens too. against: (name, config, split) of other data, that
      should share no image and no id.
    limit: at most so many records, evenly spaced; 0: all. threads: that open images; 0: one a core.

  Raises:
    ValueError, FileNotFoundError: what the source raises for data that cannot be read at all.
  """
  view, data = VIEWS[config.data.examples], config.data
  source = view.source(data, split)
  numbers = range(0, len(source), max(1, -(-len(source) // limit)) if limit else 1)
  items = [view.item(source[number], data) for number in numbers]
  ids = [str(number) for item in items for number in item.ids]
  report = Report(len(items), len(ids) or len(items), view.entries)
  report.ids = None if _are_numbers(ids, numbers) else set(ids)
  report.duplicate_ids = {number: times for number, times in Counter(ids).items() if times > 1}
  prefix = (
    caption.prompt(config, tokenizer).text if tokenizer and data.examples == "caption" else ""
  )
  for kind, (key, ends) in view.limits.items():
    texts = [text for item in items for text in item.texts if text.kind == kind]
    if texts:
      report.texts[kind] = _measure(texts, data, tokenizer, prefix, key, ends)
  if any(item.answers for item in items):
    report.answers = Counter(
      answer for item in items for answers in item.answers for answer in answers
    )
  if any(item.label for item in items):
    report.labels = Counter(item.label for item in items if item.label)
  unreadable = _open_images(report, items, data, threads or os.cpu_count())
  report.samples = _samples(items, unreadable)
  names = {image for item in items for image in item.images if _is_path(image)}
  for name, other, other_split in against:
    report.overlaps[name] = _overlap(names, report.ids, other, other_split)
  _judge(report, items, data, split)
  return report


def _is_path(image):
  return isinstance(image, str | os.PathLike)


def _are_numbers(ids, numbers):
  """Whether ids are nothing but the numbers of the records or entries, which sources give where the data have none."""
  return ids in (list(map(str, range(len(ids)))), list(map(str, numbers)))


def _samples(items, unreadable):
  """Items with images that can be read, evenly spaced.

  The texts of one image together, unless they have boxes.
  """
  found = {}
  for item in items:
    if not any(not isinstance(image, np.ndarray) and image in unreadable for image in item.images):
      key = item.boxes, *(image if _is_path(image) else id(image) for image in item.images)
      first = found.setdefault(key, item._replace(shown=[]))
      first.shown.extend(item.shown)
  found = list(found.values())
  return [
    found[i] for i in np.linspace(0, len(found) - 1, min(len(found), SHEET_IMAGES)).astype(int)
  ]


def _measure(texts, data, tokenizer, prefix, key, ends):
  """A list of Text -> Texts.

  `key`: of config.data, the limit of tokens. `ends`: a [SEP] counts too.
  """
  words = _lengths(
    [len(text.text.split()) for text in texts], data, "max_words" if "max_words" in data else ""
  )
  tokens = None
  if tokenizer:
    rows = [tokenizer.encode(prefix + text.read) for text in texts]
    tokens = _lengths(
      [len(row) + (ends and row[-1] != tokenizer.eos_id) for row in rows], data, key
    )
  lists = [text.text for text in texts if text.text[:1] + text.text[-1:] in ("[]", "{}")]
  return Texts(len(texts), words, tokens, sum(not text.text.strip() for text in texts), lists)


def _lengths(counts, data, key):
  counts = np.array(counts)
  found = tuple(int(x) for x in np.percentile(counts, PERCENTILES, method="inverted_cdf"))
  most = data[key] if key else 0
  return Lengths(found, int(counts.max()), key, most, int((counts > most).sum()) if key else 0)


def _open_images(report, items, data, threads):
  """Opens every file and encoded image.

  Notes in `report` what cannot be read, and boxes outside. Returns those that cannot be read.
  """
  boxes, called = {}, {}  # of every image
  for item in items:
    for image in item.images:
      if isinstance(image, np.ndarray):
        report.images += 1  # made by the source itself
        continue
      boxes.setdefault(image, []).extend(item.boxes)
      called[image] = image if _is_path(image) else f"of record {item.ids[0]}"
  report.images += len(boxes)
  unreadable, images = set(), iter(boxes)
  with ThreadPoolExecutor(threads) as pool:
    while part := list(itertools.islice(images, _AT_A_TIME)):
      for image, (size, problem) in zip(
        part, pool.map(lambda image: _open(image, called[image], data), part)
      ):
        if size:
          _check_boxes(report, called[image], boxes[image], *size)
          continue
        unreadable.add(image)
        if problem:
          report.corrupt.append(problem)
        else:
          report.missing.append(image)
  return unreadable


def _open(image, name, data):
  """-> ((height, width), ""), or (None, what is wrong: "" if the file is missing)."""
  try:
    if _is_path(image) and not archives.is_file(image):
      return None, ""
    pixels = (
      video.read_clip(image, data.frames, data.frame_sampling, name)[0]
      if data.frames
      else ops.decode_image(image, name)
    )
  except (ImageError, OSError) as error:
    return None, str(error)
  except ValueError as error:  # the archive
    return None, f"Image {name} cannot be read: {error}"
  return pixels.shape[:2], ""


def _check_boxes(report, name, boxes, height, width):
  report.boxes += len(boxes)
  for phrase, (x1, y1, x2, y2) in boxes:
    if min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0):
      report.outside.append(
        f"{name}: {(x1, y1, x2, y2)} of {phrase!r} in {width} x {height} pixels"
      )
    elif x1 < 0 or y1 < 0 or x2 > width or y2 > height:
      report.cut += 1


def _overlap(images, ids, config, split):
  """-> (images, ids) that other data have too, sorted."""
  view = VIEWS[config.data.examples]
  source = view.source(config.data, split)
  others = [view.item(source[number], config.data) for number in range(len(source))]
  other_ids = [str(number) for item in others for number in item.ids]
  common = images & {image for item in others for image in item.images if _is_path(image)}
  known = ids is not None and not _are_numbers(other_ids, range(len(others)))
  return sorted(map(str, common)), sorted(ids & set(other_ids)) if known else []


def _judge(report, items, data, split):
  """Fills errors and warnings."""
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
  most = data.get("max_answers", 0)
  if wide := sum(len(set(answers)) > most for item in items for answers in item.answers):
    report.errors.append(
      f"{wide} questions have more different answers than config.data.max_answers={most}; raise it."
    )
  if report.outside:
    report.errors.append(
      f"{len(report.outside)} boxes lie outside their image: {examples_of(report.outside, '; ')}."
    )
  if report.cut:
    report.warnings.append(
      f"{report.cut} of {report.boxes} boxes reach beyond their image; they would be cut there."
    )
  if report.duplicate_ids:
    report.warnings.append(f"{len(report.duplicate_ids)} ids occur more than once.")
  if (
    report.labels
    and split == "train"
    and (unused := [label for label in data.labels if label not in report.labels])
  ):
    report.warnings.append(f"No record has the label {', '.join(unused)}.")
  for kind, texts in report.texts.items():
    if texts.empty:
      report.warnings.append(f"{texts.empty} of {texts.count} {kind}s are empty.")
    if texts.lists:
      report.warnings.append(
        f"{len(texts.lists)} {kind}s look like lists, but are no valid JSON and so are text: "
        f"{texts.lists[0]!r}."
      )
  for name, (images, ids) in report.overlaps.items():
    if images or ids:
      report.warnings.append(f"{len(images)} images and {len(ids)} ids are in {name} too.")
