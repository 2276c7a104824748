"""RefCOCO, RefCOCO+ and RefCOCOg as the REFER tool has them -> the json files of configs/grounding.py:data=refcoco."""

from mplug_jax.data.prepare import json_stream
from mplug_jax.data.prepare.download import Images, zipped
from mplug_jax.data.sources import grounding
from mplug_jax.data.storage import archives
from mplug_jax.tensor_files import torch_types, torch_unpickler

SPLIT_BY = ("unc", "google", "umd")
_TESTS = {
  "testA": "images with several people",
  "testB": "images of other things",
  "test": "the test split",
}


def refcoco(download, out, name, split_by=""):
  """Referring expressions: refs(...).p and instances.json -> train, val and the test splits, each expression with its object's box.

  name: refcoco, refcoco+ or refcocog. split_by: whose splits; "": umd for refcocog, else unc.
  """
  split_by = split_by or ("umd" if name == "refcocog" else "unc")
  folders = ("", name, f"refer/data/{name}")
  what = f"{name}.zip of the REFER tool"
  refs_path, instances = download.require(
    *(
      zipped(file, what, f"{name}.zip", folders=folders, inner=name)
      for file in (f"refs({split_by}).p", "instances.json")
    )
  )
  refs = _refs(refs_path)
  splits = sorted({split for _, split, *_ in refs})
  for split in ("train", "val"):
    if split not in splits:
      raise ValueError(
        f"{refs_path}: no entry is of split {split!r}; they are of {', '.join(splits)}; get the "
        f"file again."
      )
  files, boxes = _instances(instances, {ref["ann_id"] for ref, *_ in refs})
  entries = {split: out.entries(f"{split}.json", "objects") for split in splits}
  images = Images(
    download,
    "the train2014 images of COCO",
    (
      "train2014",
      "coco/train2014",
      "train2014.zip/train2014",
      "coco/train2014.zip/train2014",
      "refer/data/images/mscoco/images/train2014",
      "images/train2014",
    ),
    out.folder,
  )
  expressions = 0
  for ref, split, texts, where in refs:
    if ref["ann_id"] not in boxes:
      raise ValueError(
        f"{where}: no annotation of {instances} has the id {ref['ann_id']}; get both files again."
      )
    image_id, box = boxes[ref["ann_id"]]
    if image_id != ref["image_id"] or image_id not in files:
      raise ValueError(
        f"{where}: image_id {ref['image_id']} is not that of its annotation, {image_id}, or no "
        f"image of {instances}."
      )
    if image := images(files[image_id]):
      entries[split].add({"image": image, "bbox": box, "sentences": texts, "ref_id": ref["ref_id"]})
      expressions += len(texts)
  images.finish(out)
  out.note(f"{expressions:,} expressions altogether, in the splits of {split_by}")
  command = ("base", "data=refcoco", f"root={out.folder}")
  out.command("grounding", *command, mode="train")
  for split in (split for split in splits if split in _TESTS):
    out.command(
      "grounding", *command, f"test={split}", flags={"eval.split": "test"}, mode="evaluate"
    )


def _refs(path):
  """A file of refs -> list of (entry, split, expressions, where).

  Nothing in it is run. Raises ValueError.
  """
  values, unknown = torch_unpickler.load(archives.open_bytes(path), path, kind="list of refs")
  if unknown:
    raise ValueError(
      f"{path} names {', '.join(sorted(unknown))}, and a list of refs consists of plain values; "
      f"get the file again."
    )
  if not isinstance(values, list):
    raise ValueError(f"{path} must hold a list of objects, not {torch_types.describe(values)}.")
  refs = []
  for number, entry in enumerate(values, 1):
    where = f"{path}, entry {number}"
    json_stream.check(
      entry, {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}, where
    )
    if entry["split"] not in ("train", "val", *_TESTS):
      raise ValueError(
        f"{where}: split {entry['split']!r} is not one of train, val, {', '.join(_TESTS)}."
      )
    for sentence in entry["sentences"]:
      json_stream.check(sentence, {"sent": str}, f"{where}, sentences")
    refs.append(
      (entry, entry["split"], [_text(sentence["sent"]) for sentence in entry["sentences"]], where)
    )
  return refs


def _text(text):
  """A byte string of Python 2, which the unpickler reads as Latin-1, is UTF-8.

  A text is what it is.
  """
  try:
    return text.encode("latin-1").decode("utf-8")
  except UnicodeError:
    return text


def _instances(path, wanted):
  """instances.json -> ({image id: file name}, {annotation id: (image id, [x, y, width, height])} of those wanted). Raises ValueError."""
  files = {
    entry["id"]: entry["file_name"]
    for entry, _ in json_stream.entries(path, {"id": int, "file_name": str}, "images")
  }
  boxes = {}
  for entry, where in json_stream.entries(
    path, {"id": int, "image_id": int, "bbox": list}, "annotations"
  ):
    if entry["id"] in wanted:
      grounding.corners(entry["bbox"], where, "sizes")
      boxes[entry["id"]] = entry["image_id"], entry["bbox"]
  return files, boxes
