"""RefCOCO, RefCOCO+ and RefCOCOg of the REFER tool: the JSON files of configs/grounding.py."""

import functools
from collections.abc import Container
from typing import Any, NamedTuple

from mplug_jax.data.prepare import json_stream
from mplug_jax.data.prepare.dataset import Dataset
from mplug_jax.data.prepare.download import Download, Images, zipped
from mplug_jax.data.prepare.writer import Output
from mplug_jax.data.sources import grounding
from mplug_jax.data.storage import archives
from mplug_jax.tensor_files import torch_types, torch_unpickler

SPLIT_BY = ("unc", "google", "umd")
# Splits besides train and val: images with several people, images of other things, the test split.
_TESTS = ("testA", "testB", "test")
_IMAGE_FOLDERS = (
  "train2014",
  "coco/train2014",
  "train2014.zip/train2014",
  "coco/train2014.zip/train2014",
  "refer/data/images/mscoco/images/train2014",
  "images/train2014",
)


class _Ref(NamedTuple):
  """An object with its expressions."""

  entry: dict[str, Any]
  split: str
  texts: list[str]
  location: str


def refcoco(download: Download, out: Output, name: str, split_by: str = "") -> None:
  """Writes train, val and the test splits, each expression with the box of its object.

  Args:
    download: the downloaded files.
    out: where the files are written.
    name: refcoco, refcoco+ or refcocog.
    split_by: author of the splits, one of SPLIT_BY; "": umd for refcocog, else unc.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  split_by = split_by or ("umd" if name == "refcocog" else "unc")
  folders = ("", name, f"refer/data/{name}")
  title = f"{name}.zip of the REFER tool"
  refs_path, instances = download.require(
    *(
      zipped(file, title, f"{name}.zip", folders=folders, inner=name)
      for file in (f"refs({split_by}).p", "instances.json")
    )
  )
  refs = _refs(refs_path)
  splits = sorted({ref.split for ref in refs})
  for split in ("train", "val"):
    if split not in splits:
      raise ValueError(
        f"{refs_path}: no entry is of split {split!r}; they are of {', '.join(splits)}; get the "
        "file again."
      )
  files, boxes = _instances(instances, {ref.entry["ann_id"] for ref in refs})
  entries = {split: out.entries(f"{split}.json", "objects") for split in splits}
  images = Images(download, "the train2014 images of COCO", _IMAGE_FOLDERS, out.folder)
  expressions = 0
  for ref in refs:
    image_id, box = _box_of(ref, files, boxes, instances)
    if image := images(files[image_id]):
      entries[ref.split].add(
        {"image": image, "bbox": box, "sentences": ref.texts, "ref_id": ref.entry["ref_id"]}
      )
      expressions += len(ref.texts)
  images.finish(out)
  out.note(f"{expressions:,} expressions altogether, in the splits of {split_by}")
  command = ("base", "data=refcoco", f"root={out.folder}")
  out.command("grounding", *command, mode="train")
  for split in (split for split in splits if split in _TESTS):
    out.command(
      "grounding", *command, f"test={split}", flags={"eval.split": "test"}, mode="evaluate"
    )


def _box_of(
  ref: _Ref, files: Container[int], boxes: dict[int, tuple[int, list]], instances: str
) -> tuple[int, list]:
  """Returns (image id, box) of an object; raises ValueError if the files disagree."""
  annotation = ref.entry["ann_id"]
  if annotation not in boxes:
    raise ValueError(
      f"{ref.location}: no annotation of {instances} has the id {annotation}; get both files again."
    )
  image_id, box = boxes[annotation]
  if image_id != ref.entry["image_id"] or image_id not in files:
    raise ValueError(
      f"{ref.location}: image_id {ref.entry['image_id']} is not that of its annotation, "
      f"{image_id}, or no image of {instances}."
    )
  return image_id, box


def _refs(path: str) -> list[_Ref]:
  """Reads a file of refs without executing anything in it; raises ValueError."""
  values, unknown = torch_unpickler.load(archives.open_bytes(path), path, kind="list of refs")
  if unknown:
    raise ValueError(
      f"{path} names {', '.join(sorted(unknown))}, but a list of refs consists of plain values; "
      "get the file again."
    )
  if not isinstance(values, list):
    raise ValueError(f"{path} must hold a list of objects, not {torch_types.describe(values)}.")
  types = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}
  refs: list[_Ref] = []
  for number, entry in enumerate(values, 1):
    location = f"{path}, entry {number}"
    json_stream.check(entry, types, location)
    if entry["split"] not in ("train", "val", *_TESTS):
      raise ValueError(
        f"{location}: split {entry['split']!r} is not one of train, val, {', '.join(_TESTS)}."
      )
    for sentence in entry["sentences"]:
      json_stream.check(sentence, {"sent": str}, f"{location}, sentences")
    texts = [_text(sentence["sent"]) for sentence in entry["sentences"]]
    refs.append(_Ref(entry, entry["split"], texts, location))
  return refs


def _text(text: str) -> str:
  """Decodes a UTF-8 byte string of Python 2, which the unpickler reads as Latin-1."""
  try:
    return text.encode("latin-1").decode("utf-8")
  except UnicodeError:
    return text


def _instances(
  path: str, wanted: Container[int]
) -> tuple[dict[int, str], dict[int, tuple[int, list]]]:
  """Reads instances.json; raises ValueError.

  Returns:
    {image id: file name}, {wanted annotation id: (image id, [x, y, width, height])}.
  """
  files = {
    entry["id"]: entry["file_name"]
    for entry, _ in json_stream.entries(path, {"id": int, "file_name": str}, "images")
  }
  boxes: dict[int, tuple[int, list]] = {}
  types = {"id": int, "image_id": int, "bbox": list}
  for entry, location in json_stream.entries(path, types, "annotations"):
    if entry["id"] in wanted:
      grounding.corners(entry["bbox"], location, "sizes")  # raises ValueError for a wrong box
      boxes[entry["id"]] = entry["image_id"], entry["bbox"]
  return files, boxes


def _dataset(name: str, title: str) -> Dataset:
  return Dataset(
    f"{title}'s referring expressions with boxes.",
    functools.partial(refcoco, name=name),
    own_folder=True,
    split_by=SPLIT_BY,
  )


REFCOCO = _dataset("refcoco", "RefCOCO")
REFCOCO_PLUS = _dataset("refcoco+", "RefCOCO+")
REFCOCOG = _dataset("refcocog", "RefCOCOg")
