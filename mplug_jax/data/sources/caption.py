"""Captioning records: images with captions, from every supported source."""

import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mplug_jax.data.errors import RecordError
from mplug_jax.data.sources import scenes as scene_sources
from mplug_jax.data.sources.entry_errors import EntryErrors
from mplug_jax.data.sources.entry_ids import EntryIds, check_type
from mplug_jax.data.sources.scene_captions import ClipCaptions, SceneCaptions
from mplug_jax.data.sources.source import ImageSource, Record
from mplug_jax.data.storage import (
  annotations,
  image_folder,
  image_paths,
  json_values,
  packed,
  shards,
  tabular,
)
from mplug_jax.data.storage.archives import StrPath
from mplug_jax.metrics.ids import canonical

# Our split -> its names in files that hold all splits.
_SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


class CaptionRecords:
  """A sequence of records as a source of images."""

  def __init__(self, records: Sequence[Record]):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    return self._records[index]

  def captions(self, index: int) -> list[str]:
    """Returns the captions of an image."""
    return self._records[index]["captions"]

  def counts(self) -> Int[np.ndarray, "images"]:
    """Returns the number of captions of every image."""
    if isinstance(self._records, packed.Grouped):
      return self._records.counts()
    return np.array([len(record["captions"]) for record in self._records], np.int64)

  def group(self, index: int) -> str | None:
    """Returns the domain of an image, if the benchmark has domains."""
    return self._records[index].get("domain")


def images(data: Mapping[str, Any], split: str) -> ImageSource:
  """Returns the images of a split, each once, with all their captions.

  The sources, rows of SOURCES, read these keys of config.data:

  - scenes: size, seed, difficulty of scenes.scene.SceneConfig; records: of the training split, 0
    for all.
  - clips: as scenes; rendered clips of data.frames or more.
  - karpathy: train_files (list), val_file, test_file: lists of {"filename", "filepath",
    "sentences": [{"raw"}, ...]}, or an object whose "images" are such entries with their "split"
    (dataset_coco.json); image_root.
  - nocaps: train_files, val_file, test_file in the format of COCO captions: {"images": [{"id",
    "file_name", optionally "domain"}], "annotations": [{"image_id", "caption"}]}; image_root.
  - jsonl: train_files, val_file, test_file in any format of annotations.entries, a line or row
    {"image", "caption" (one or a list), optionally "image_id"} for each image; lines of one image
    are joined; image_root.
  - shards: train_files, val_file, test_file name shards, see storage/shards.py; strict. A file may
    also be a jsonl file, and a file of source jsonl may be shards, but the files of one split must
    be all the same.
  - folder: image_root with folders train, val and test, see storage/image_folder.py.
  - tfds: builder, data_dir, splits; see tfds.py.
  - vatex: train_files, val_file, test_file: lists of {"videoID", "enCap": captions}; image_root,
    video_suffix. The "images" are clips, see data.frames.
  - msrvtt: as vatex, with a line {"clip_name", "caption"} for each text.

  All sources of files except nocaps also read fields, see annotations.Fields.

  Args:
    data: config.data, a mapping with `name` and the keys of that source.
    split: "train", "val" or "test". Only "train" requires captions.

  Raises:
    ValueError: unknown name or split, unset key, malformed file (names file and entry).
    FileNotFoundError: a file or one of the first images is missing.
  """
  if data["name"] not in SOURCES:
    raise ValueError(
      f"data.name is {data['name']!r}; known sources of captions: {', '.join(SOURCES)}."
    )
  if split not in _SPLITS:
    raise ValueError(f"Split {split!r} does not exist; known splits: {', '.join(_SPLITS)}.")
  return SOURCES[data["name"]](data, split)


def _scenes(data: Mapping[str, Any], split: str) -> SceneCaptions:
  limit = data["records"] if split == "train" else 0
  return SceneCaptions(scene_sources.scene_config(data), split, limit)


def _clips(data: Mapping[str, Any], split: str) -> ClipCaptions:
  limit = data["records"] if split == "train" else 0
  return ClipCaptions(scene_sources.scene_config(data), split, limit, max(8, data["frames"]))


def _vatex(data: Mapping[str, Any], split: str) -> CaptionRecords:
  records = _Records(data, split)
  for entry, location in annotations.split_entries(data, split, ("videoID",), ("enCap",)):
    annotations.require_texts(entry, ("videoID",), location)
    captions = _texts(entry, "enCap", location)
    records.add(entry["videoID"] + data["video_suffix"], entry["videoID"], captions, location)
  return records.source()


def _texts(entry: Record, key: str, location: str) -> list[str]:
  """Returns the captions of an entry; none if they are missing or null."""
  return [] if entry.get(key) is None else annotations.text_list(entry, key, location)


def _msrvtt(data: Mapping[str, Any], split: str) -> CaptionRecords:
  records = _Records(data, split)
  for entry, location in annotations.split_entries(data, split, ("clip_name", "caption")):
    annotations.require_texts(entry, ("clip_name",), location)
    captions = annotations.text_list(entry, "caption", location)
    records.add(entry["clip_name"] + data["video_suffix"], entry["clip_name"], captions, location)
  return records.source()


def _karpathy(data: Mapping[str, Any], split: str) -> CaptionRecords:
  records = _Records(data, split)
  folders: dict[str, str] = {}
  for entry, location in _image_entries(data, split):
    annotations.require_texts(entry, ("filename", "filepath"), location)
    sentences = entry.get("sentences", [])
    if not isinstance(sentences, list):
      raise ValueError(f"{location}: sentences must be a list of objects with 'raw'.")
    for sentence in sentences:
      annotations.require(sentence, ("raw",), f"{location}, sentences")
    name = entry.get("filepath", "")
    if name not in folders:
      folders[name] = _coco_folder(data["image_root"], name)
    image = str(pathlib.PurePath(folders[name], entry["filename"]))
    records.add(image, _coco_id(entry), [sentence["raw"] for sentence in sentences], location)
  return records.source()


def _coco_folder(root: str, name: str) -> str:
  """Returns the folder of COCO's images: train2014_img of the official code, if it exists."""
  official = pathlib.Path(root, f"{name}_img")
  return official.name if name in ("train2014", "val2014") and official.is_dir() else name


def _image_entries(data: Mapping[str, Any], split: str) -> Iterator[tuple[Record, str]]:
  """Yields (entry, location) of lists, and of those "images" of an object that are in the split."""
  fields = annotations.Fields(data, ("filename",), ("filepath", "sentences", "cocoid", "split"))
  for path in annotations.split_files(data, split):
    if not says_splits(path):
      yield from annotations.entries(path, fields)
      continue
    content = annotations.read_json(path, fields.checks)
    annotations.require(content, ("images",), path)
    for number, value in enumerate(content["images"], 1):
      location = f"{path}, image {number}"
      entry = fields.rename(value, location)
      annotations.require(entry, ("split",), location)
      if entry["split"] in _SPLITS[split]:
        yield entry, location


def says_splits(path: StrPath) -> bool:
  """Returns whether the images of a file state their split, so that it can hold all splits.

  Args:
    path: a file of source karpathy.
  """
  if tabular.kind(path) != "json":
    return False
  return next((line.lstrip()[0] for line in tabular.lines(path) if line.strip()), "") == "{"


def _coco_id(entry: Record) -> int | str:
  """Returns the number of COCO's image, which its server requires, or else the file name.

  The number is a field of the entry, or part of the file name.
  """
  number = re.fullmatch(r"COCO_\w+_(\d{12})\.\w+", entry["filename"])
  return entry.get("cocoid", int(number[1]) if number else entry["filename"])


def _nocaps(data: Mapping[str, Any], split: str) -> CaptionRecords:
  if data.get("fields"):
    raise ValueError(
      "config.data.fields cannot rename keys of source nocaps, which are those of COCO captions."
    )
  records = _Records(data, split)
  checks = json_values.Checks(data.get("strict", False))
  for path in annotations.split_files(data, split):
    content = annotations.read_json(path, checks)
    annotations.require(content, ("images",), path)
    captions: dict[Any, list[str]] = {}
    for number, entry in enumerate(content["images"], 1):
      location = f"{path}, image {number}"
      annotations.require(entry, ("id", "file_name"), location)
      check_type(entry["id"], "id", location)
      captions[entry["id"]] = []
    for number, entry in enumerate(content.get("annotations", []), 1):
      location = f"{path}, annotation {number}"
      annotations.require(entry, ("image_id", "caption"), location)
      if entry["image_id"] not in captions:
        raise ValueError(f"{location}: no image of the file has id {entry['image_id']!r}.")
      captions[entry["image_id"]].append(entry["caption"])
    listed = set()
    for number, entry in enumerate(content["images"], 1):
      location = f"{path}, image {number}"
      if (entry["id"], entry["file_name"]) in listed:
        continue
      listed.add((entry["id"], entry["file_name"]))
      texts = captions[entry["id"]]
      records.add(entry["file_name"], entry["id"], texts, location, entry.get("domain"))
  return records.source()


def _jsonl(data: Mapping[str, Any], split: str) -> ImageSource:
  names = annotations.split_names(data, split)
  if any(map(shards.is_pattern, names)):
    return _shards(data, names, split)
  records = _Records(data, split)
  keys = ("image", "caption") if split == "train" else ("image",)
  for entry, location in annotations.split_entries(data, split, keys, ("caption", "image_id")):
    annotations.require_texts(entry, ("image",), location)
    captions = _texts(entry, "caption", location)
    records.add(entry["image"], entry.get("image_id"), captions, location)
  return records.source()


def _shards(data: Mapping[str, Any], names: Sequence[str], split: str) -> shards.ShardImages:
  if data.get("fields"):
    raise ValueError(
      "config.data.fields cannot rename members and keys of shards; docs/shards.md lists them."
    )
  if not all(map(shards.is_pattern, names)):
    raise ValueError(
      f"{', '.join(names)} are shards and other files together; only configs/pretrain.py mixes "
      "them."
    )
  source = shards.load(names, data.get("strict", False))
  if split != "train":
    _check_keys(source, split)
  return source


def _check_keys(source: shards.ShardImages, split: str) -> None:
  """Raises ValueError if two pairs of tars, whose keys are in memory, have one key."""
  ids = EntryIds("key", split)
  for part in source.parts:
    if isinstance(part, shards.TarPairs):
      for number in range(len(part)):
        ids.add(f"{part.path}/{part.key(number)}", f"{part.path}, pair {number + 1}")


def _folder(data: Mapping[str, Any], split: str) -> CaptionRecords:
  records = _Records(data, split)
  for name, captions, location in image_folder.images(data["image_root"], split):
    records.add(name, name, captions, location)
  return records.source()


def _tfds(data: Mapping[str, Any], split: str) -> ImageSource:
  from mplug_jax.data.sources import tfds

  return tfds.Captions(data, split)


class _Records:
  """Collects checked records of files; entries of one image_id become one record.

  A training entry without a caption is left out, counted and named, as `EntryErrors` says.
  """

  def __init__(self, data: Mapping[str, Any], split: str):
    self._root = data["image_root"]
    self._training = split == "train"
    self._paths = image_paths.ImagePaths()
    self._records = packed.Grouped(("image", "image_id", "domain"), "captions")
    self._errors = EntryErrors(data.get("strict", False))
    self._locations: list[str] = []  # of the first entry of each image that is evaluated

  def add(
    self,
    image: str,
    image_id: Any,
    captions: Iterable[Any],
    location: str,
    domain: str | None = None,
  ) -> None:
    """Adds an image.

    Args:
      image: its path under data.image_root.
      image_id: its id; None: its path.
      captions: its captions.
      location: for messages.
      domain: its part of the split.

    Raises:
      ValueError: the id is no number or text, a caption is no text, a training image has none, or
        another image has the id. In splits that are evaluated, 7 and "7" are the same id.
    """
    captions = list(captions)
    if image_id is None:
      image_id = image
    check_type(image_id, "image_id", location)
    key = image_id if self._training else canonical(image_id)
    if not all(isinstance(caption, str) for caption in captions):
      raise ValueError(f"{location}: every caption must be a string.")
    if self._training and not any(map(str.strip, captions)):
      problem = "the caption is empty" if captions else "there is no caption"
      error = f"{location}: {problem}; a training image needs at least one."
      self._errors.failed(location, RecordError(error))
      return
    self._errors.passed(location)
    path = self._paths(self._root, "image_root", image, location)
    number = self._records.find(key)
    if number is None:
      number = self._records.add({"image": path, "image_id": image_id, "domain": domain}, key)
      if not self._training:
        self._locations.append(location)
    elif (other := self._records.head(number)["image"]) != path:
      first = "" if self._training else f" ({self._locations[number]})"
      raise ValueError(
        f"{location}: image_id {image_id!r} is already that of {other}{first}; give every image "
        "its own."
      )
    for caption in captions:
      self._records.add_item(number, caption.lower())

  def source(self) -> CaptionRecords:
    """Returns the source of the records; raises RecordError as `EntryErrors.end`."""
    self._errors.end("entries")
    return CaptionRecords(self._records.close())


# config.data.name -> source.
SOURCES: dict[str, Callable[[Mapping[str, Any], str], ImageSource]] = {
  "scenes": _scenes,
  "karpathy": _karpathy,
  "nocaps": _nocaps,
  "jsonl": _jsonl,
  "shards": _jsonl,
  "clips": _clips,
  "vatex": _vatex,
  "msrvtt": _msrvtt,
  "folder": _folder,
  "tfds": _tfds,
}
