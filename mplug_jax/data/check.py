"""What training would meet in its data: `check` reads every record and opens every image, `lines` says what it found.

It reads through the task's own source, so that whatever the source refuses is refused here with the same sentence. Imports no JAX.
"""

import dataclasses
import itertools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mplug_jax.data.examples import caption, classification, grounding, retrieval
from mplug_jax.data.images import ops, video
from mplug_jax.data.sources import vqa
from mplug_jax.data.storage import archives
from mplug_jax.data.text import cleaning
from mplug_jax.reporting import sample_sheet

_NAMED = 10  # images, ids and the like that a report names
_COVERED = (10, 100, 1000)  # most frequent answers whose share is reported
_AT_A_TIME = 1024  # images handed to the threads
_PERCENTILES = (50, 90, 99)
_SHEET_IMAGES, _SHEET_TEXTS, _SHEET_PIXELS, _SHEET_FRAMES, _SHEET_GAP = 12, 4, 288, 4, 8
_BOX_COLOUR = (230, 30, 30)


class Text(NamedTuple):
  """A text of a record. kind: what it is called. text: cleaned as the task cleans it, not cut. read: what the tokenizer gets of it."""

  kind: str
  text: str
  read: str


class Item(NamedTuple):
  """What is checked of one record. images: as decode_image or read_clip take them. ids: of its entries. shown: (text, what is said to
  it) pairs for people to look at. answers: lists, of every question. label: the class. boxes: (phrase, corners)."""

  images: list
  ids: list
  texts: list
  shown: list
  answers: tuple = ()
  label: str | None = None
  boxes: tuple = ()


def _vqa(record, data):
  questions = record["questions"]
  texts = [
    (
      q["question"],
      cleaning.vqa_text(q["question"], q["ocr"], q["objects"], data.add_ocr, data.add_objects),
    )
    for q in questions
  ]
  answers = [answer for q in questions for answer in dict.fromkeys(q["answers"])]
  return Item(
    [record["image"]],
    [q["question_id"] for q in questions],
    [Text("question", *text) for text in texts]
    + [Text("answer", answer, answer) for answer in answers],
    [(q["question"], ", ".join(dict.fromkeys(q["answers"]))) for q in questions],
    answers=tuple(q["answers"] for q in questions),
  )


def _caption(record, data):
  del data
  return Item(
    [record["image"]],
    [record["image_id"]],
    [Text("caption", text, text) for text in record["captions"]],
    [("", text) for text in record["captions"]],
  )


def _retrieval(record, data):
  return Item(
    [record["image"]],
    [record["image_id"]],
    [_cleaned("caption", text, data) for text in record["captions"]],
    [("", text) for text in record["captions"]],
  )


def _grounding(record, data):
  del data
  phrases = record["expressions"]
  return Item(
    [record["image"]],
    [p["id"] for p in phrases if "id" in p],
    [Text("phrase", p["text"], p["text"].lower()) for p in phrases],
    [("", p["text"]) for p in phrases[:1]],
    boxes=tuple((p["text"], p["box"]) for p in phrases if p["box"] is not None),
  )


def _classification(record, data):
  sentence = record["sentence"]
  return Item(
    record["images"],
    [record["id"]],
    [_cleaned("sentence", sentence, data)],
    [(sentence, record["label"] or "(no label)")],
    label=record["label"],
  )


def _cleaned(kind, text, data):
  return Text(
    kind, cleaning.pre_caption(text, len(text)), cleaning.pre_caption(text, data.max_words)
  )


class _View(NamedTuple):
  """How the records of a task are read and checked. entries: what they are called. limits: of every kind of text, the key of
  config.data that limits its tokens and whether [SEP] is one of them."""

  source: Any  # (config.data, split) -> source
  item: Any  # (record, config.data) -> Item
  entries: str
  limits: dict


_VIEWS = {  # by config.data.examples
  "vqa": _View(
    vqa.get,
    _vqa,
    "questions",
    {"question": ("max_question", False), "answer": ("max_answer_tokens", True)},
  ),
  "caption": _View(caption.images, _caption, "images", {"caption": ("max_caption", True)}),
  "retrieval": _View(
    retrieval.get_images, _retrieval, "images", {"caption": ("max_caption", False)}
  ),
  "pretrain": _View(
    retrieval.get_images, _retrieval, "images", {"caption": ("max_caption", False)}
  ),
  "grounding": _View(grounding.get_source, _grounding, "phrases", {"phrase": ("max_phrase", True)}),
  "classification": _View(
    classification.get_source, _classification, "statements", {"sentence": ("max_text", False)}
  ),
}


class Lengths(NamedTuple):
  """Lengths of texts. percentiles: those of _PERCENTILES. limit: key of config.data, or "". over: texts beyond it."""

  percentiles: tuple
  longest: int
  limit: str = ""
  most: int = 0
  over: int = 0


@dataclasses.dataclass
class Texts:
  """The texts of one kind. tokens: Lengths, None without a tokenizer. empty: without a word. lists: such as look like lists."""

  count: int
  words: Lengths
  tokens: Lengths | None
  empty: int
  lists: list


@dataclasses.dataclass
class Report:
  """What `check` found; see `lines`. errors: why training would fail. warnings: what it would put up with."""

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


def check(config, split="train", tokenizer=None, against=(), limit=0, threads=0) -> Report:
  """Reads the records of a split and opens their images, each once. Generated images are kept in memory: set a limit.

  Args:
    tokenizer: to measure texts in tokens too. against: (name, config, split) of other data, that should share no image and no id.
    limit: at most so many records, evenly spaced; 0: all. threads: that open images; 0: one a core.

  Raises:
    ValueError, FileNotFoundError: what the source raises for data that cannot be read at all.
  """
  view, data = _VIEWS[config.data.examples], config.data
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
  """Items with images that can be read, evenly spaced; the texts of one image together, unless they have boxes."""
  found = {}
  for item in items:
    if not any(not isinstance(image, np.ndarray) and image in unreadable for image in item.images):
      key = item.boxes, *(image if _is_path(image) else id(image) for image in item.images)
      first = found.setdefault(key, item._replace(shown=[]))
      first.shown.extend(item.shown)
  found = list(found.values())
  return [
    found[i] for i in np.linspace(0, len(found) - 1, min(len(found), _SHEET_IMAGES)).astype(int)
  ]


def _measure(texts, data, tokenizer, prefix, key, ends):
  """A list of Text -> Texts. `key`: of config.data, the limit of tokens. `ends`: a [SEP] counts too."""
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
  found = tuple(int(x) for x in np.percentile(counts, _PERCENTILES, method="inverted_cdf"))
  most = data[key] if key else 0
  return Lengths(found, int(counts.max()), key, most, int((counts > most).sum()) if key else 0)


def _open_images(report, items, data, threads):
  """Opens every file and encoded image; notes in `report` what cannot be read, and boxes outside. Returns those that cannot be read."""
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
  except (ops.ImageError, OSError) as error:
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
  view = _VIEWS[config.data.examples]
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
      f"{len(report.outside)} boxes lie outside their image: {_some(report.outside, '; ')}."
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
        f"{len(texts.lists)} {kind}s look like lists, but are no valid JSON and so are text: {texts.lists[0]!r}."
      )
  for name, (images, ids) in report.overlaps.items():
    if images or ids:
      report.warnings.append(f"{len(images)} images and {len(ids)} ids are in {name} too.")


def _some(values, separator=", "):
  """The first values as text."""
  values = list(values)
  return separator.join(map(str, values[:_NAMED])) + f"{separator}..." * (len(values) > _NAMED)


def lines(report) -> list[str]:
  """A Report as lines of text, errors and warnings last."""
  unreadable = len(report.missing) + len(report.corrupt)
  out = [
    f"records   {report.records:,}"
    + f" with {report.entries:,} {report.entries_name}" * (report.entries != report.records),
    f"images    {report.images:,}: {report.images - unreadable:,} readable, {len(report.missing):,} missing, "
    f"{len(report.corrupt):,} corrupt",
  ]
  out += [f"  missing: {name}" for name in report.missing[:_NAMED]]
  out += [f"  corrupt: {sentence}" for sentence in report.corrupt[:_NAMED]]
  out.append(
    "ids       none are given"
    if report.ids is None
    else f"ids       {len(report.ids):,} different, {len(report.duplicate_ids):,} of them more than once"
    + f": {_some(report.duplicate_ids)}" * bool(report.duplicate_ids)
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
      f"boxes     {report.boxes:,}: {len(report.outside):,} outside their image, {report.cut:,} reaching beyond it"
    )
  for name, (images, ids) in report.overlaps.items():
    out.append(f"shared with {name}: {len(images):,} images, {len(ids):,} ids")
    out += [
      f"  {what}: {_some(found)}" for what, found in (("images", images), ("ids", ids)) if found
    ]
  return (
    out
    + [f"warning: {text}" for text in report.warnings]
    + [f"error: {text}" for text in report.errors]
  )


def _length_line(found):
  text = (
    ", ".join(f"{p}% have at most {n}" for p, n in zip(_PERCENTILES, found.percentiles))
    + f", the longest has {found.longest}"
  )
  return (
    text
    + f"; {found.over:,} exceed config.data.{found.limit}={found.most} and are cut"
    * bool(found.limit)
  )


def _shares(counts):
  total = counts.total()
  return _some(
    f"{name} {times:,} ({100 * times / total:.1f}%)" for name, times in counts.most_common()
  )


def write_sheet(report, path, frames=0) -> bool:
  """Draws the samples of a report with their texts as one PNG; a box is that of the first phrase.

  Args:
    frames: config.data.frames.

  Returns:
    False, and no file is written, if no image can be read.
  """
  if report.samples:
    images = np.stack([_picture(item, frames) for item in report.samples])
    said = [
      [sample_sheet.Sample(text, answer, "", "open") for text, answer in item.shown[:_SHEET_TEXTS]]
      for item in report.samples
    ]
    sample_sheet.sample_sheet(images, said, path)
  return bool(report.samples)


def _picture(item, frames):
  """The images of a record side by side on a white square, u8[_SHEET_PIXELS, _SHEET_PIXELS, 3]."""
  from PIL import Image, ImageDraw

  pictures = []
  for image in item.images:
    pixels = (
      video.contact_image(image, min(frames, _SHEET_FRAMES)) if frames else ops.decode_image(image)
    )
    picture = Image.fromarray(pixels)
    for _, box in item.boxes[:1]:
      ImageDraw.Draw(picture).rectangle(
        box, outline=_BOX_COLOUR, width=max(1, max(picture.size) // 100)
      )
    pictures.append(picture)
  side = (_SHEET_PIXELS + _SHEET_GAP) // len(pictures) - _SHEET_GAP
  sheet = Image.new("RGB", (_SHEET_PIXELS, _SHEET_PIXELS), "white")
  for i, picture in enumerate(pictures):
    scale = side / max(picture.size)
    size = [max(1, round(length * scale)) for length in picture.size]
    left, top = i * (side + _SHEET_GAP) + (side - size[0]) // 2, (_SHEET_PIXELS - size[1]) // 2
    sheet.paste(picture.resize(size, Image.Resampling.BICUBIC), (left, top))
  return np.asarray(sheet)
