"""Classification records: labeled sentences about one or two images, from every source."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mplug_jax.data.errors import RecordError
from mplug_jax.data.sources import scenes as scene_sources
from mplug_jax.data.sources import text_assignment
from mplug_jax.data.sources.entry_errors import EntryErrors
from mplug_jax.data.sources.entry_ids import EntryIds
from mplug_jax.data.sources.source import Record, StatementSource
from mplug_jax.data.storage import annotations, archives, image_paths, packed
from mplug_jax.scenes import pairs, rendering, statements
from mplug_jax.scenes import scene as scenes

OTHER_SIDE = {"left": "right", "right": "left"}


class Records:
  """A sequence of records as a source."""

  def __init__(self, records: Sequence[Record]):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    return self._records[index]

  def row(self, index: int) -> Record:
    """Returns a record without its images."""
    return {name: value for name, value in self._records[index].items() if name != "images"}

  def groups(self, index: int) -> tuple[str, ...]:
    """Returns no subsets, because files name none."""
    return ()


class _SceneRecords:
  """Generated statements; a subclass finds each by its number."""

  def __init__(self, config: scenes.SceneConfig, split: str, easy_fraction: float):
    self._config = config
    self._split = split
    self._easy_fraction = easy_fraction

  def __len__(self) -> int:
    return scenes.split_size(self._split)

  def _row(self, index: int, text: str, label: object) -> Record:
    return {"id": f"{self._split}-{index}", "sentence": text, "label": str(label)}


class _Pairs(_SceneRecords):
  """Statements about two scenes, with labels "True" and "False".

  Subsets are the quantity that a statement is about and what it says of it.
  """

  def __getitem__(self, index: int) -> Record:
    pair = self._pair(index)
    return self._row(index, pair.text, pair.label) | {
      "images": [rendering.render(scene, self._config) for scene in (pair.left, pair.right)],
      "more": lambda rng, count: statements.pair_statements(
        rng, pair.left, pair.right, count, self._easy_fraction
      ),
    }

  def row(self, index: int) -> Record:
    """Returns a record without its images."""
    pair = self._pair(index)
    return self._row(index, pair.text, pair.label)

  def _pair(self, index: int) -> pairs.Pair:
    return pairs.pair(self._config, self._split, index)

  def groups(self, index: int) -> tuple[str, ...]:
    """Returns the names of the subsets that a record belongs to."""
    pair = self._pair(index)
    kind, content, _ = pairs.PAIR_TEMPLATES[pair.template]
    # Only statements about objects name a pair of shape and color.
    return (content, kind, *(_novelty(pair.unseen) if content == "object" else ()))


class _Hypotheses(_SceneRecords):
  """Hypotheses about a scene, with labels of scenes.pairs.LABELS; subsets are the relations."""

  def __getitem__(self, index: int) -> Record:
    entailment = self._entailment(index)
    return self._row(index, entailment.text, entailment.label) | {
      "images": [rendering.render(entailment.premise, self._config)],
      "more": lambda rng, count: statements.hypotheses(
        rng, entailment.premise, count, self._easy_fraction
      ),
    }

  def row(self, index: int) -> Record:
    """Returns a record without its images."""
    entailment = self._entailment(index)
    return self._row(index, entailment.text, entailment.label)

  def _entailment(self, index: int) -> pairs.Entailment:
    return pairs.entailment(self._config, self._split, index)

  def groups(self, index: int) -> tuple[str, ...]:
    """Returns the names of the subsets that a record belongs to."""
    entailment = self._entailment(index)
    relation = entailment.form.relations[0][0]
    if relation in ("larger", "smaller"):
      kind = "size"
    elif relation in OTHER_SIDE:
      kind = "side"
    else:
      kind = "height"
    return kind, *_novelty(entailment.unseen)


def _novelty(unseen: bool) -> tuple[str]:
  """Returns the subset of statements that name, or not, an unseen pair of shape and color."""
  return ("unseen",) if unseen else ("seen",)


def scene_statements(data: Mapping[str, Any], split: str) -> StatementSource:
  """Returns generated statements about one or two scenes.

  Args:
    data: config.data with images_per_text, easy_fraction, and size, seed and difficulty of
      SceneConfig.
    split: "train", "val" or "test".

  Raises:
    ValueError: images_per_text is neither 1 nor 2.
  """
  kinds = {1: _Hypotheses, 2: _Pairs}
  if data["images_per_text"] not in kinds:
    raise ValueError(
      f"config.data.images_per_text={data['images_per_text']} must be 1 or 2 for generated scenes."
    )
  kind = kinds[data["images_per_text"]]
  return kind(scene_sources.scene_config(data), split, data["easy_fraction"])


def scene_captions(data: Mapping[str, Any], split: str) -> StatementSource:
  """Returns captions of generated scenes for text assignment.

  Args:
    data: config.data with labels, and size, seed, difficulty of SceneConfig.
    split: "train", "val" or "test".
  """
  captions = scene_sources.SceneCaptions(scene_sources.scene_config(data), split)
  return text_assignment.TextAssignment(captions, data["labels"], data["seed"])


def _images(entry: Record, key: str, count: int, location: str) -> list[str]:
  """Returns the image names of an entry; raises ValueError unless there are `count`."""
  names = annotations.text_list(entry, key, location)
  if len(names) != count:
    raise ValueError(
      f"{location}: {key} names {len(names)} images, but config.data.images_per_text is {count}."
    )
  return names


def _label(entry: Record, data: Mapping[str, Any], location: str, training: bool) -> str:
  """Returns the class of an entry as text; "" if it has none, or null outside of training."""
  if entry.get("label") is None and not training:
    return ""
  label = str(entry["label"])  # true of JSON is "True", as the official files write it
  if label not in data["labels"]:
    raise RecordError(
      f"{location}: label {label!r} is not one of config.data.labels, {', '.join(data['labels'])}."
    )
  return label


def _read(
  data: Mapping[str, Any],
  split: str,
  key: str,
  rename: Callable[[list[str]], list[str]] | None = None,
) -> Records:
  """Reads the files of a split.

  An entry with an unknown label is counted and named, as `EntryErrors` says: training leaves it
  out, evaluation keeps it without a label.

  Args:
    data: config.data.
    split: "train", "val" or "test".
    key: the field with the names of the images.
    rename: maps those names to names below config.data.image_root.
  """
  records = packed.Packed(("images", "id", "sentence", "label"))
  path_of = image_paths.ImagePaths()
  ids = EntryIds("id", split)
  keys = ("sentence", key, "label") if split == "train" else ("sentence", key)
  effect = "It is left out." if split == "train" else "It is classified, but does not count."
  errors = EntryErrors(data.get("strict", False), effect)
  for entry, location in annotations.split_entries(data, split, keys, ("label", "id")):
    annotations.require_texts(entry, ("sentence",), location)
    names = _images(entry, key, data["images_per_text"], location)
    if rename:
      names = rename(names)
    label = ""
    try:
      label = _label(entry, data, location, split == "train")
      if label:
        errors.passed(location)
    except RecordError as error:
      errors.failed(location, error)
      if split == "train":
        continue
    records.append(
      {
        "images": [path_of(data["image_root"], "image_root", name, location) for name in names],
        "id": ids.add(entry.get("id"), location),
        "sentence": entry["sentence"],
        "label": label,
      }
    )
  errors.end("labels")
  return Records(records)


def nlvr2(data: Mapping[str, Any], split: str) -> Records:
  """Reads the official files of NLVR2.

  Args:
    data: config.data with the files of the splits and image_root.
    split: "train", "val" or "test".

  Raises:
    ValueError, FileNotFoundError: as in annotations.split_entries and image_paths.ImagePaths.
  """
  named_paths_exist: bool | None = None  # decided by the first training image

  def rename(names: list[str]) -> list[str]:
    # The official code reads all training images from one folder, whatever their names are.
    nonlocal named_paths_exist
    if "train" not in names[0]:
      return names
    if named_paths_exist is None:
      named_paths_exist = archives.is_file(os.path.join(data["image_root"] or "", names[0]))
    return names if named_paths_exist else [f"train/{os.path.basename(name)}" for name in names]

  return _read(data, split, "images", rename)


def snli_ve(data: Mapping[str, Any], split: str) -> Records:
  """Reads the official files of SNLI-VE, which name images without ".jpg"; as `nlvr2`."""
  return _read(data, split, "image", lambda names: [f"{name}.jpg" for name in names])


def jsonl(data: Mapping[str, Any], split: str) -> Records:
  """Reads files of any format of annotations.entries; as `nlvr2`."""
  return _read(data, split, "image" if data["images_per_text"] == 1 else "images")


def caption_pairs(data: Mapping[str, Any], split: str) -> StatementSource:
  """Reads images with captions for text assignment; one without a caption is counted and left out.

  Args:
    data: config.data with the files of the splits, image_root, labels and seed.
    split: "train", "val" or "test".

  Raises:
    ValueError, FileNotFoundError: as in annotations.split_entries and image_paths.ImagePaths.
  """
  records = packed.Packed(("image", "image_id", "captions"))
  path_of = image_paths.ImagePaths()
  errors = EntryErrors(data.get("strict", False))
  for entry, location in annotations.split_entries(data, split, ("image", "caption")):
    annotations.require_texts(entry, ("image",), location)
    captions = annotations.text_list(entry, "caption", location)
    if not any(map(str.strip, captions)):
      problem = "the caption is empty" if captions else "the list of captions is empty"
      errors.failed(location, RecordError(f"{location}: {problem}."))
      continue
    errors.passed(location)
    records.append(
      {
        "image": path_of(data["image_root"], "image_root", entry["image"], location),
        "image_id": entry["image"],
        "captions": captions,
      }
    )
  errors.end("entries")
  return text_assignment.TextAssignment(records, data["labels"], data["seed"])
