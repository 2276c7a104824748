"""Sources of referring expressions, by name: `get(config.data, split)`.

A source is random access: `len(source)`, `source[i]` (a record) and `source.expressions(i)` (its
expressions alone, without making the image). A record is

    {"image": path | encoded bytes | u8[H, W, 3], "image_id": str, "expressions": [expression, ...]}

and an expression {"text": str, "box": (x1, y1, x2, y2) in pixels with exclusive ends, or None when
it is not known, "id": str (not of scenes)}. Those of scenes say also whether they need a relation
("needs_relation") and name what training never shows ("unseen").
"""

import math
import pathlib

from mplug_jax.data.storage import annotations, packed
from mplug_jax.tensor_files import torch_annotations

TRANSVG_SETS = ("unc", "unc+", "gref_umd", "referit", "flickr")
_UNION = ("referit", "unc", "unc+", "gref_umd")  # what "vg_uni" trains on
# Folders of images under data.image_root.
_FOLDERS = {"referit": "referit/images", "flickr": "Flickr30k/flickr30k_images"}
_COCO_FOLDER = "other/images/mscoco/images/train2014"


class ExpressionRecords:
  """A sequence of records as a source."""

  def __init__(self, records):
    self._records = records

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    return self._records[index]

  def expressions(self, index):
    return self._records[index]["expressions"]


def get(data, split):
  """The source that `data.name` names.

  Args:
    data: config.data, a mapping with `name`, `expressions_per_image` and the keys of that source:
      scenes: size, seed, difficulty; made with `expressions_per_image` expressions each.
      transvg: dataset (unc, unc+, gref_umd, referit, flickr, or vg_uni = the training lists of the
        four but flickr, with unc for the other splits), split_root with
        {dataset}/{dataset}_{split}.pth, image_root, and test_name, the list of split "test" (testA,
        testB or test).
      jsonl: train_files, val_file, test_file with a line or row {"image", "text", "box": [x1, y1,
        x2, y2], optionally "id"} for each expression, in any format of json_records.entries;
        image_root.
      refcoco: the same files as json lists of {"image" or "file_name", "bbox": [x, y, width,
        height], "sentences": a list of strings or of {"sent"}, optionally "ref_id"}, as of the
        REFER tool; image_root.
        Both: fields, see json_records.Fields.
      tfds: builder, data_dir, splits, fields; see tfds_source.py.
    split: "train", "val" or "test". Only "train" insists on boxes.

  Returns:
    A source; expressions of one image make one record if expressions_per_image > 1, otherwise each
    is a record.

  Raises:
    ValueError: unknown name or split, unset key, malformed file (names file and entry).
    FileNotFoundError: a file or one of the first images is missing.
  """
  builders = {
    "scenes": _scenes,
    "transvg": _transvg,
    "jsonl": _jsonl,
    "refcoco": _refcoco,
    "tfds": _tfds,
  }
  if data["name"] not in builders:
    raise ValueError(f"data.name is {data['name']!r}; known sources: {', '.join(builders)}.")
  if split not in ("train", "val", "test"):
    raise ValueError(f"Split {split!r} does not exist; known splits: train, val, test.")
  return builders[data["name"]](data, split)


def _scenes(data, split):
  from mplug_jax.data.sources import scenes

  return scenes.SceneExpressions(
    scenes.scene_config(data), split, expressions=data["expressions_per_image"]
  )


def _tfds(data, split):
  from mplug_jax.data.sources import tfds

  return tfds.Expressions(data, split)


class _Collector:
  """Puts expressions into records, by image if so configured."""

  def __init__(self, data, training):
    self._data, self._training = data, training
    self._paths, self._count = annotations.ImagePaths(), 0
    self._records = packed.Grouped(("image", "image_id"), "expressions", ("id", "text", "box"))

  def add(self, image, text, box, where, number=None, folder=""):
    """box: corners, or None.

    Number: the expression's id. Raises ValueError for a wrong type or a missing box.
    """
    for key, value in (("image", image), ("text", text)):
      if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a string.")
    if box is None and self._training:
      raise ValueError(f"{where}: it has no box; a training expression needs one.")
    root = self._data.get("image_root")
    path = self._paths(root and str(pathlib.Path(root, folder)), "image_root", image, where)
    grouped = self._data["expressions_per_image"] > 1
    record = self._records.find(path) if grouped else None
    if record is None:
      record = self._records.add({"image": path, "image_id": image}, path if grouped else None)
    self._records.add_item(
      record, {"id": str(self._count if number is None else number), "text": text, "box": box}
    )
    self._count += 1

  def source(self):
    return ExpressionRecords(self._records.close())


def corners(values, where, form, whole=False):
  """A box of a file -> (x1, y1, x2, y2).

  Args:
    values: list, tuple or array of numbers. form: "corners", or "sizes" for [x, y, width, height].
    whole: cut the numbers to whole pixels, as the official code does, where that leaves something.

  Raises:
    ValueError: not four finite numbers, or an empty box.
  """
  numbers = torch_annotations.numbers(values)
  what = "[x1, y1, x2, y2]" if form == "corners" else "[x, y, width, height]"
  if numbers is None or len(numbers) != 4 or not all(map(math.isfinite, numbers)):
    raise ValueError(f"{where}: the box must be a list of four numbers, {what} in pixels.")

  def ends(x, y, a, b):
    return (x, y, a, b) if form == "corners" else (x, y, x + a, y + b)

  box, cut = ends(*numbers), ends(*(float(int(x)) for x in numbers))
  if _empty(box):
    raise ValueError(f"{where}: the box {numbers} is empty; it should be {what} in pixels.")
  return cut if whole and not _empty(cut) else box


def _empty(box):
  return box[2] <= box[0] or box[3] <= box[1]


def _jsonl(data, split):
  found = _Collector(data, split == "train")
  keys = ("image", "text", "box") if split == "train" else ("image", "text")
  for entry, where in annotations.split_entries(data, split, keys, ("box", "id")):
    box = None if entry.get("box") is None else corners(entry["box"], where, "corners")
    found.add(entry["image"], entry["text"], box, where, entry.get("id"))
  return found.source()


def _refcoco(data, split):
  found = _Collector(data, split == "train")
  for entry, where in annotations.split_entries(
    data, split, ("sentences",), ("image", "file_name", "bbox", "ref_id")
  ):
    box = None if entry.get("bbox") is None else corners(entry["bbox"], where, "sizes")
    if not isinstance(entry["sentences"], list):
      raise ValueError(
        f"{where}: sentences must be a list of strings or of objects with the key sent."
      )
    for i, sentence in enumerate(entry["sentences"]):
      text = sentence.get("sent") if isinstance(sentence, dict) else sentence
      number = f"{entry['ref_id']}-{i}" if "ref_id" in entry else None
      found.add(entry.get("file_name", entry.get("image")), text, box, where, number)
  return found.source()


def _transvg(data, split):
  """The official lists: tuples (image, mask, box, phrase, attributes), of flickr (image, box, phrase)."""
  dataset = data["dataset"]
  if dataset not in (*TRANSVG_SETS, "vg_uni"):
    raise ValueError(
      f"data.dataset={dataset!r} is not one of {', '.join((*TRANSVG_SETS, 'vg_uni'))}."
    )
  if not data.get("split_root"):
    raise ValueError(
      "data.split_root is not set; it is the folder with unc/unc_train.pth and so on."
    )
  names = (
    _UNION
    if dataset == "vg_uni" and split == "train"
    else ("unc" if dataset == "vg_uni" else dataset,)
  )
  found = _Collector(data, split == "train")
  for name in names:
    suffix = data["test_name"] if split == "test" else split
    path = pathlib.Path(data["split_root"], name, f"{name}_{suffix}.pth")
    if not path.is_file():
      raise FileNotFoundError(
        f"{path} does not exist; check data.split_root, data.dataset and data.test_name."
      )
    _add_transvg(found, path, name)
  return found.source()


def _add_transvg(found, path, name):
  entries = torch_annotations.load(path)
  fields = 3 if name == "flickr" else 5
  if not isinstance(entries, list):
    raise ValueError(f"{path} must hold a list of tuples (image, mask, box, phrase, attributes).")
  for number, entry in enumerate(entries, 1):
    where = f"{path}, entry {number}"
    if not isinstance(entry, (tuple, list)) or len(entry) != fields:
      raise ValueError(f"{where}: must be a tuple of {fields} values.")
    image, box, phrase = entry if fields == 3 else (entry[0], entry[2], entry[3])
    box = corners(box, where, "corners" if name in _FOLDERS else "sizes", whole=True)
    found.add(image, phrase, box, where, folder=_FOLDERS.get(name, _COCO_FOLDER))
