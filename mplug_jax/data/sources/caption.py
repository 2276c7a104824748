"""Captioning records: images with captions, from every supported source."""

import pathlib
import re

import numpy as np

from mplug_jax.data.sources import scenes as scene_sources
from mplug_jax.data.storage import annotations, image_folder, packed, shards, tabular
from mplug_jax.scenes import oracle, parser, scene
from mplug_jax.scenes import text as scene_text

_SPLITS = {
  "train": ("train", "restval"),
  "val": ("val",),
  "test": ("test",),
}  # of files that hold all splits


# ---- sources


class CaptionRecords:
  """A sequence of records as a source of images."""

  def __init__(self, records):
    self._records = records

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    return self._records[index]

  def captions(self, index):
    return self._records[index]["captions"]

  def counts(self):
    """i64[N]: captions of every image."""
    if isinstance(self._records, packed.Grouped):
      return self._records.counts()
    return np.array([len(record["captions"]) for record in self._records], np.int64)

  def group(self, index):
    return self._records[index].get("domain")


class SceneCaptions(scene_sources.SceneCaptions):
  """Generated scenes as a source of images.

  A group shows (shape, colour) pairs that training never shows, the other does not.
  """

  def counts(self):
    return np.full(len(self), self._captions, np.int64)

  def group(self, index):
    return "unseen" if scene.scene(self.config, self.split, index).unseen else "seen"

  def another_caption(self, index):
    """One more caption from the same templates, which is not among the references: what a perfect model of them would say."""
    return scene_text.captions(scene.scene(self.config, self.split, index), self._captions + 1)[-1]

  def is_true(self, index, text):
    """Whether a caption is worded like those of scenes and true of the image, beyond doubt."""
    form = parser.parse(text)
    return (
      form is not None and oracle.holds(form, scene.scene(self.config, self.split, index)) is True
    )


class ClipCaptions(scene_sources.SceneClips):
  """Rendered clips as a source of "images"; groups as of SceneCaptions."""

  def counts(self):
    return np.array([len(self.captions(i)) for i in range(len(self))], np.int64)

  def group(self, index):
    return "unseen" if self.shows_unseen(index) else "seen"


def images(data, split):
  """The images of a split, each once, with all their captions.

  Args:
    data: config.data, a mapping with `name` and the keys of that source:
      scenes: size, seed, difficulty of `scenes.SceneConfig`; records: of the training split, 0:
        all.
      karpathy: train_files (list), val_file, test_file: lists of {"filename", "filepath",
        "sentences": [{"raw"}, ...]}, or an object whose "images" are those and say their "split"
        (dataset_coco.json); image_root.
      nocaps: train_files, val_file, test_file in the format of COCO captions: {"images": [{"id",
        "file_name", optionally "domain"}], "annotations": [{"image_id", "caption"}]}; image_root.
      jsonl: train_files, val_file, test_file in any format of json_records.entries, a line or row
        {"image", "caption" (one or a list), optionally "image_id"} for each image; those of one
        image are put together; image_root.
      shards: train_files, val_file, test_file name shards, see shards.py; strict. Any of them may
        also be a file of jsonl, and what source jsonl names may be shards, but the files of one
        split are all the same.
      folder: image_root with folders train, val and test, see folder.py.
      tfds: builder, data_dir, splits; see tfds_source.py.
      clips: as scenes; rendered clips of data.frames or more. vatex: train_files, val_file,
        test_file: lists of {"videoID", "enCap": captions}; msrvtt: a line {"clip_name", "caption"}
        for each text; both: image_root, video_suffix. Their "images" are clips, see data.frames.
      All sources of files but nocaps: fields, see json_records.Fields.
    split: "train", "val" or "test". Only "train" insists on captions.

  Raises:
    ValueError: unknown name or split, unset key, malformed file (names file and entry).
    FileNotFoundError: a file or one of the first images is missing.
  """
  builders = {
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
  if data["name"] not in builders:
    raise ValueError(
      f"data.name is {data['name']!r}; known sources of captions: {', '.join(builders)}."
    )
  if split not in _SPLITS:
    raise ValueError(f"Split {split!r} does not exist; known splits: {', '.join(_SPLITS)}.")
  return builders[data["name"]](data, split)


def _scenes(data, split):
  return SceneCaptions(
    scene_sources.scene_config(data), split, data["records"] if split == "train" else 0
  )


def _clips(data, split):
  return ClipCaptions(
    scene_sources.scene_config(data),
    split,
    data["records"] if split == "train" else 0,
    max(8, data["frames"]),
  )


def _vatex(data, split):
  records = _Records(data, split)
  for entry, where in annotations.split_entries(data, split, ("videoID",), ("enCap",)):
    annotations.require_texts(entry, ("videoID",), where)
    captions = annotations.text_list(entry, "enCap", where) if "enCap" in entry else []
    records.add(entry["videoID"] + data["video_suffix"], entry["videoID"], captions, where)
  return records.source()


def _msrvtt(data, split):
  records = _Records(data, split)
  for entry, where in annotations.split_entries(data, split, ("clip_name", "caption")):
    annotations.require_texts(entry, ("clip_name",), where)
    records.add(
      entry["clip_name"] + data["video_suffix"],
      entry["clip_name"],
      annotations.text_list(entry, "caption", where),
      where,
    )
  return records.source()


def _karpathy(data, split):
  records, folders = _Records(data, split), {}
  for entry, where in _image_entries(data, split):
    annotations.require_texts(entry, ("filename", "filepath"), where)
    sentences = entry.get("sentences", [])
    if not isinstance(sentences, list):
      raise ValueError(f"{where}: sentences must be a list of objects with 'raw'.")
    for sentence in sentences:
      annotations.require(sentence, ("raw",), f"{where}, sentences")
    name = entry.get("filepath", "")
    if name not in folders:  # the official folder of COCO's two is called so, where it exists
      official = pathlib.Path(data["image_root"], f"{name}_img")
      folders[name] = (
        official.name if name in ("train2014", "val2014") and official.is_dir() else name
      )
    image = str(pathlib.PurePath(folders[name], entry["filename"]))
    records.add(image, _coco_id(entry), [sentence["raw"] for sentence in sentences], where)
  return records.source()


def _image_entries(data, split):
  """(entry, where) of lists, or of those "images" of an object (dataset_coco.json) that belong to the split."""
  fields = annotations.Fields(data, ("filename",), ("filepath", "sentences", "cocoid", "split"))
  for path in annotations.split_files(data, split):
    if not says_splits(path):
      yield from annotations.entries(path, fields)
      continue
    content = annotations.read_json(path)
    annotations.require(content, ("images",), path)
    for number, entry in enumerate(content["images"], 1):
      where = f"{path}, image {number}"
      entry = fields.rename(entry, where)
      annotations.require(entry, ("split",), where)
      if entry["split"] in _SPLITS[split]:
        yield entry, where


def says_splits(path):
  """Whether a file of source karpathy is an object whose images say their split, so that one file can hold all splits."""
  if tabular.kind(path) != "json":
    return False
  return next((line.lstrip()[0] for line in tabular.lines(path) if line.strip()), "") == "{"


def _coco_id(entry):
  """The number of COCO's image, which its server wants: said, or in the file's name.

  Else the name.
  """
  number = re.fullmatch(r"COCO_\w+_(\d{12})\.\w+", entry["filename"])
  return entry.get("cocoid", int(number[1]) if number else entry["filename"])


def _nocaps(data, split):
  if data.get("fields"):
    raise ValueError(
      "config.data.fields cannot rename anything in source nocaps, whose keys are those of COCO "
      "captions."
    )
  records = _Records(data, split)
  for path in annotations.split_files(data, split):
    content = annotations.read_json(path)
    annotations.require(content, ("images",), path)
    captions = {}
    for number, entry in enumerate(content["images"], 1):
      annotations.require(entry, ("id", "file_name"), f"{path}, image {number}")
      captions[entry["id"]] = []
    for number, entry in enumerate(content.get("annotations", []), 1):
      where = f"{path}, annotation {number}"
      annotations.require(entry, ("image_id", "caption"), where)
      if entry["image_id"] not in captions:
        raise ValueError(f"{where}: no image of the file has id {entry['image_id']!r}.")
      captions[entry["image_id"]].append(entry["caption"])
    for number, entry in enumerate(content["images"], 1):
      records.add(
        entry["file_name"],
        entry["id"],
        captions[entry["id"]],
        f"{path}, image {number}",
        entry.get("domain"),
      )
  return records.source()


def _jsonl(data, split):
  names = annotations.split_names(data, split)
  if any(map(shards.is_pattern, names)):
    return _shards(data, names)
  records = _Records(data, split)
  keys = ("image", "caption") if split == "train" else ("image",)
  for entry, where in annotations.split_entries(data, split, keys, ("caption", "image_id")):
    annotations.require_texts(entry, ("image",), where)
    captions = annotations.text_list(entry, "caption", where) if "caption" in entry else []
    records.add(entry["image"], entry.get("image_id", entry["image"]), captions, where)
  return records.source()


def _shards(data, names):
  if data.get("fields"):
    raise ValueError(
      "config.data.fields cannot rename anything in shards, whose members and keys docs/shards.md "
      "names."
    )
  if not all(map(shards.is_pattern, names)):
    raise ValueError(
      f"{', '.join(names)} are shards and other files together; only configs/pretrain.py mixes "
      f"them."
    )
  return shards.load(names, data.get("strict", False))


def _folder(data, split):
  records = _Records(data, split)
  for name, captions, where in image_folder.images(data["image_root"], split):
    records.add(name, name, captions, where)
  return records.source()


def _tfds(data, split):
  from mplug_jax.data.sources import tfds

  return tfds.Captions(data, split)


class _Records:
  """Collects records of files, checked; what is added of one image_id is one record."""

  def __init__(self, data, split):
    self._root, self._training, self._paths = (
      data["image_root"],
      split == "train",
      annotations.ImagePaths(),
    )
    self._records = packed.Grouped(("image", "image_id", "domain"), "captions")

  def add(self, image, image_id, captions, where, domain=None):
    """image: path under data.image_root."""
    if not all(isinstance(caption, str) for caption in captions):
      raise ValueError(f"{where}: every caption must be a string.")
    path, number = self._paths(self._root, "image_root", image, where), self._records.find(image_id)
    if number is None:
      number = self._records.add({"image": path, "image_id": image_id, "domain": domain}, image_id)
    elif (other := self._records.head(number)["image"]) != path:
      raise ValueError(f"{where}: image_id {image_id!r} is already that of {other}.")
    if self._training and not captions:
      raise ValueError(f"{where}: there is no caption; a training image needs at least one.")
    for caption in captions:
      self._records.add_item(number, caption.lower())

  def source(self):
    return CaptionRecords(self._records.close())
