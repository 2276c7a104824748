"""Sources of referring expressions, by name.

A source has `len(source)`, `source[i]` (a record) and `source.expressions(i)` (its expressions,
without its image). A record is

    {"image": path | encoded bytes | u8[H, W, 3], "image_id": str, "expressions": [expression, ...]}

and an expression {"text": str, "box": (x1, y1, x2, y2) in pixels with exclusive ends, or None if
unknown, "id": str (not of scenes)}. Expressions of scenes also say whether they need a relation
("needs_relation") and whether they name what training never shows ("unseen"). Those of files have,
in a record, also "location": (file, line, row or entry).

An entry whose box is unusable is counted and named in the log: training leaves it out, evaluation
keeps its expression without a box. data.strict refuses it, as does a file without a usable box.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from mplug_jax.data.errors import BadRecords, RecordError, note
from mplug_jax.data.sources.entry_errors import EntryErrors, split_location
from mplug_jax.data.sources.entry_ids import EntryIds
from mplug_jax.data.sources.source import ExpressionSource, Record
from mplug_jax.data.storage import annotations, image_paths, packed
from mplug_jax.tensor_files import torch_annotations

TRANSVG_SETS = ("unc", "unc+", "gref_umd", "referit", "flickr")
_UNION = ("referit", "unc", "unc+", "gref_umd")  # training sets of "vg_uni"
# Folders of images under data.image_root.
_FOLDERS = {"referit": "referit/images", "flickr": "Flickr30k/flickr30k_images"}
_COCO_FOLDER = "other/images/mscoco/images/train2014"

_REVERSED = 0.1  # of boxes that end before they begin, from which it is no slip

Box = tuple[float, float, float, float]


class ExpressionRecords:
  """A sequence of records as a source.

  Attributes:
    bad: count of the entries whose box is unusable.
  """

  def __init__(self, records: Sequence[Record], bad: BadRecords | None = None):
    self._records = records
    self.bad = bad or BadRecords()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    return self._records[index]

  def expressions(self, index: int) -> list[Record]:
    """Returns the expressions of a record."""
    expressions = self._records[index]["expressions"]
    return [{key: e[key] for key in e if key != "location"} for e in expressions]


def get(data: Mapping[str, Any], split: str) -> ExpressionSource:
  """Returns the source that `data.name` names.

  The sources, rows of SOURCES, read these keys of config.data:

  - scenes: size, seed, difficulty; made with `expressions_per_image` expressions each.
  - transvg: dataset (unc, unc+, gref_umd, referit, flickr, or vg_uni = the training lists of the
    four but flickr, with unc for the other splits), split_root with
    {dataset}/{dataset}_{split}.pth, image_root, and test_name, the list of split "test" (testA,
    testB or test).
  - jsonl: train_files, val_file, test_file with a line or row {"image", "text", "box": [x1, y1,
    x2, y2], optionally "id"} for each expression, in any format of annotations.entries; image_root;
    fields, see annotations.Fields.
  - refcoco: the same keys; JSON lists of {"image" or "file_name", "bbox": [x, y, width, height],
    "sentences": a list of strings or of {"sent"}, optionally "ref_id"}, as of the REFER tool.
  - tfds: builder, data_dir, splits, fields; see tfds.py.

  Args:
    data: config.data, a mapping with `name`, `expressions_per_image` and the keys of that source.
    split: "train", "val" or "test". Only "train" requires boxes.

  Returns:
    A source; expressions of one image make one record if expressions_per_image > 1, otherwise each
    is a record.

  Raises:
    ValueError: unknown name or split, unset key, malformed file (names file and entry).
    FileNotFoundError: a file or one of the first images is missing.
  """
  if data["name"] not in SOURCES:
    raise ValueError(f"data.name is {data['name']!r}; known sources: {', '.join(SOURCES)}.")
  if split not in ("train", "val", "test"):
    raise ValueError(f"Split {split!r} does not exist; known splits: train, val, test.")
  return SOURCES[data["name"]](data, split)


def _scenes(data: Mapping[str, Any], split: str) -> ExpressionSource:
  from mplug_jax.data.sources import scenes

  return scenes.SceneExpressions(
    scenes.scene_config(data), split, expressions=data["expressions_per_image"]
  )


def _tfds(data: Mapping[str, Any], split: str) -> ExpressionSource:
  from mplug_jax.data.sources import tfds

  return tfds.Expressions(data, split)


class _ReversedBox(RecordError):
  """Raised for corners that would be a box as [x, y, width, height]."""


class _Collector:
  """Collects expressions into records, by image if so configured."""

  def __init__(self, data: Mapping[str, Any], split: str, key: str = "id"):
    self._data = data
    self._training = split == "train"
    self._paths = image_paths.ImagePaths()
    self._ids = EntryIds(key, split)
    keys = ("id", "text", "box", "location")
    self._records = packed.Grouped(("image", "image_id"), "expressions", keys)
    self._files: dict[str, str] = {}  # one object for a file, which `packed` stores once a block
    effect = "It is left out."
    if not self._training:
      effect = "Its expression is located, but does not count."
    self._reversed = 0  # number of boxes that would not be empty as [x, y, width, height]
    self._first_reversed = ""  # the first of them, as a sentence without its end
    self._errors = EntryErrors(data.get("strict", False), effect)

  def add(
    self,
    image: Any,
    text: Any,
    box: Callable[[], Box | None],
    location: str,
    number: Any = None,
    folder: str = "",
  ) -> None:
    """Adds an expression, or counts it as bad.

    Args:
      image: name of its image.
      text: the expression.
      box: function that returns its corners in pixels, or None without a box.
      location: for messages.
      number: its id; None: its number.
      folder: folder of the image under data.image_root.

    Raises:
      ValueError: `image` or `text` is no string, a training expression has no box, or two
        evaluated expressions have one id.
      RecordError: data.strict, and the box is unusable.
    """
    for key, value in (("image", image), ("text", text)):
      if not isinstance(value, str):
        raise ValueError(f"{location}: {key} must be a string.")
    expression_id = str(self._ids.add(number, location))
    corners = None
    try:
      corners = box()
      if corners is not None:
        self._errors.passed(location)
      elif self._training:
        raise ValueError(f"{location}: it has no box; a training expression needs one.")
    except RecordError as error:
      if isinstance(error, _ReversedBox):
        self._reversed += 1
        self._first_reversed = self._first_reversed or str(error).partition(" is empty")[0]
      self._errors.failed(location, error)
      if self._training:
        return
    root = self._data.get("image_root")
    path = self._paths(root and str(pathlib.Path(root, folder)), "image_root", image, location)
    grouped = self._data["expressions_per_image"] > 1
    record = self._records.find(path) if grouped else None
    if record is None:
      record = self._records.add({"image": path, "image_id": image}, path if grouped else None)
    file, entry = split_location(location)
    location_parts = self._files.setdefault(file, file), entry
    self._records.add_item(
      record, {"id": expression_id, "text": text, "box": corners, "location": location_parts}
    )

  def source(self) -> ExpressionRecords:
    """Returns the source of the records.

    Raises:
      RecordError: no box of a file is usable.
    """
    hint = ""
    if self._reversed >= max(2, _REVERSED * self._errors.total):
      hint = (
        f"{self._reversed} of {self._errors.total} boxes end before they begin: they look like [x, "
        "y, width, height] or [center x, center y, width, height], not like [x1, y1, x2, y2] "
        f"(first: {self._first_reversed}); write corners in pixels."
      )
    try:
      self._errors.end("boxes")
    except RecordError as error:
      raise RecordError(f"{error} {hint}".rstrip()) from error
    if hint:
      note(hint)
    return ExpressionRecords(self._records.close(), self._errors)


def corners(
  values: Any, location: str, form: Literal["corners", "sizes"], truncate: bool = False
) -> Box:
  """Converts a box of a file to (x1, y1, x2, y2).

  Args:
    values: list, tuple or array of numbers.
    location: for messages.
    form: "corners", or "sizes" for [x, y, width, height].
    truncate: drop the fractions of the numbers, as the official code does, unless that leaves an
      empty box.

  Returns:
    The corners in pixels.

  Raises:
    RecordError: not four finite numbers, or an empty box.
  """
  numbers = torch_annotations.numbers(values)
  form_text = "[x1, y1, x2, y2]" if form == "corners" else "[x, y, width, height]"
  if numbers is None or len(numbers) != 4 or not all(map(math.isfinite, numbers)):
    raise RecordError(f"{location}: the box must be a list of four numbers, {form_text} in pixels.")

  def ends(x: float, y: float, a: float, b: float) -> Box:
    return (x, y, a, b) if form == "corners" else (x, y, x + a, y + b)

  box = ends(*numbers)
  if _empty(box):
    reversed_box = form == "corners" and min(numbers) >= 0 and min(numbers[2:]) > 0
    kind = _ReversedBox if reversed_box else RecordError
    raise kind(f"{location}: the box {numbers} is empty; it should be {form_text} in pixels.")
  truncated = ends(*(float(int(x)) for x in numbers))
  return truncated if truncate and not _empty(truncated) else box


def _empty(box: Box) -> bool:
  return box[2] <= box[0] or box[3] <= box[1]


def _box(
  values: Any, location: str, form: Literal["corners", "sizes"], truncate: bool = False
) -> Callable[[], Box | None]:
  """Returns a function that returns `corners` of the values, or None if these are None."""
  return lambda: None if values is None else corners(values, location, form, truncate)


def _jsonl(data: Mapping[str, Any], split: str) -> ExpressionRecords:
  collector = _Collector(data, split)
  keys = ("image", "text", "box") if split == "train" else ("image", "text")
  for entry, location in annotations.split_entries(data, split, keys, ("box", "id")):
    box = _box(entry.get("box"), location, "corners")
    collector.add(entry["image"], entry["text"], box, location, entry.get("id"))
  return collector.source()


def _refcoco(data: Mapping[str, Any], split: str) -> ExpressionRecords:
  collector = _Collector(data, split, "ref_id")
  optional = ("image", "file_name", "bbox", "ref_id")
  for entry, location in annotations.split_entries(data, split, ("sentences",), optional):
    box = _box(entry.get("bbox"), location, "sizes")
    if not isinstance(entry["sentences"], list):
      raise ValueError(
        f"{location}: sentences must be a list of strings or of objects with the key sent."
      )
    for i, sentence in enumerate(entry["sentences"]):
      text = sentence.get("sent") if isinstance(sentence, dict) else sentence
      number = None if entry.get("ref_id") is None else f"{entry['ref_id']}-{i}"
      collector.add(entry.get("file_name", entry.get("image")), text, box, location, number)
  return collector.source()


def transvg_files(data: Mapping[str, Any], split: str) -> dict[pathlib.Path, str]:
  """Returns {official list of a split: name of its data set}.

  Args:
    data: config.data of source "transvg".
    split: "train", "val" or "test".

  Raises:
    ValueError: data.dataset is unknown, or data.split_root is not set.
  """
  dataset = data["dataset"]
  known = (*TRANSVG_SETS, "vg_uni")
  if dataset not in known:
    raise ValueError(f"data.dataset={dataset!r} is not one of {', '.join(known)}.")
  if not data.get("split_root"):
    raise ValueError(
      "data.split_root is not set; it is the folder with unc/unc_train.pth and so on."
    )
  names = (dataset,)
  if dataset == "vg_uni":
    names = _UNION if split == "train" else ("unc",)
  suffix = data["test_name"] if split == "test" else split
  return {pathlib.Path(data["split_root"], name, f"{name}_{suffix}.pth"): name for name in names}


def _transvg(data: Mapping[str, Any], split: str) -> ExpressionRecords:
  """Reads the official lists, whose entries `_add_transvg` describes."""
  collector = _Collector(data, split)
  for path, name in transvg_files(data, split).items():
    if not path.is_file():
      raise FileNotFoundError(
        f"{path} does not exist; check data.split_root, data.dataset and data.test_name."
      )
    _add_transvg(collector, path, name)
  return collector.source()


def _add_transvg(collector: _Collector, path: pathlib.Path, name: str) -> None:
  """Adds the entries of an official list, a pickle of tuples.

  They are (image, mask, box, phrase, attributes), of flickr (image, box, phrase).
  """
  entries = torch_annotations.load(path)
  fields = 3 if name == "flickr" else 5
  if not isinstance(entries, list):
    raise ValueError(f"{path} must hold a list of tuples (image, mask, box, phrase, attributes).")
  for number, entry in enumerate(entries, 1):
    location = f"{path}, entry {number}"
    if not isinstance(entry, (tuple, list)) or len(entry) != fields:
      raise ValueError(f"{location}: must be a tuple of {fields} values.")
    image, box, phrase = entry if fields == 3 else (entry[0], entry[2], entry[3])
    form = "corners" if name in _FOLDERS else "sizes"
    folder = _FOLDERS.get(name, _COCO_FOLDER)
    collector.add(image, phrase, _box(box, location, form, truncate=True), location, folder=folder)


# config.data.name -> source.
SOURCES: dict[str, Callable[[Mapping[str, Any], str], ExpressionSource]] = {
  "scenes": _scenes,
  "transvg": _transvg,
  "jsonl": _jsonl,
  "refcoco": _refcoco,
  "tfds": _tfds,
}
