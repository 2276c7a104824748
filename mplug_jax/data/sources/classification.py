"""Classification records: sentences about one or two images with labels, from every supported source."""

import os

from mplug_jax.data.sources import scenes as scene_sources
from mplug_jax.data.sources import text_assignment
from mplug_jax.data.storage import annotations, archives, packed
from mplug_jax.scenes import pairs, rendering, statements
from mplug_jax.scenes import scene as scenes

OTHER_SIDE = {"left": "right", "right": "left"}


# ---- sources


class Records:
  """A sequence of records as a source."""

  def __init__(self, records):
    self._records = records

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    return self._records[index]

  def row(self, index):
    """A record without its images."""
    return {name: value for name, value in self._records[index].items() if name != "images"}

  def groups(self, index):
    """Files name no subsets."""
    del index
    return ()


class _SceneRecords:
  """Records of scene_pairs.py, which a subclass finds by number."""

  def __init__(self, config, split, easier):
    self._config, self._split, self._easier = config, split, easier

  def __len__(self):
    return scenes.split_size(self._split)

  def row(self, index):
    """A record without its images."""
    return self._row(index, self._found(index))

  def _row(self, index, found):
    return {"id": f"{self._split}-{index}", "sentence": found.text, "label": str(found.label)}


class _Pairs(_SceneRecords):
  """Labels "True" and "False"; subsets by the quantity that a statement is about and by what it says of it."""

  def __getitem__(self, index):
    pair = self._found(index)
    return self._row(index, pair) | {
      "images": [rendering.render(scene, self._config) for scene in (pair.left, pair.right)],
      "more": lambda rng, count: statements.pair_statements(
        rng, pair.left, pair.right, count, self._easier
      ),
    }

  def _found(self, index):
    return pairs.pair(self._config, self._split, index)

  def groups(self, index):
    pair = self._found(index)
    kind, content, _ = pairs.PAIR_TEMPLATES[pair.template]
    return (
      content,
      kind,
      *(_novelty(pair) if content == "object" else ()),
    )  # others name no pair of shape and colour


class _Hypotheses(_SceneRecords):
  """Labels of scene_pairs.LABELS; subsets by the relation."""

  def __getitem__(self, index):
    found = self._found(index)
    return self._row(index, found) | {
      "images": [rendering.render(found.premise, self._config)],
      "more": lambda rng, count: statements.hypotheses(rng, found.premise, count, self._easier),
    }

  def _found(self, index):
    return pairs.entailment(self._config, self._split, index)

  def groups(self, index):
    found = self._found(index)
    relation = found.form.relations[0][0]
    kind = (
      "size"
      if relation in ("larger", "smaller")
      else "side"
      if relation in OTHER_SIDE
      else "height"
    )
    return kind, *_novelty(found)


def _novelty(found):
  """Whether a statement names a pair of shape and colour that training never shows."""
  return ("unseen",) if found.unseen else ("seen",)


def scene_statements(data, split):
  kinds = {1: _Hypotheses, 2: _Pairs}
  if data.images_per_text not in kinds:
    raise ValueError(
      f"config.data.images_per_text={data.images_per_text} must be 1 or 2 for generated scenes."
    )
  return kinds[data.images_per_text](scene_sources.scene_config(data), split, data.easy_fraction)


def scene_captions(data, split):
  captions = scene_sources.SceneCaptions(scene_sources.scene_config(data), split)
  return text_assignment.TextAssignment(captions, data.labels, data.seed)


def _images(entry, key, count, where):
  """The image names of an entry, of which there are `count`."""
  names = annotations.text_list(entry, key, where)
  if len(names) != count:
    raise ValueError(
      f"{where}: {key} names {len(names)} images, but config.data.images_per_text is {count}."
    )
  return names


def _label(entry, data, where):
  """The class of an entry as text; "" when it has none."""
  if "label" not in entry:
    return ""
  label = str(entry["label"])  # json's true is "True", as the official files write it
  if label not in data.labels:
    raise ValueError(
      f"{where}: label {label!r} is not one of config.data.labels, {', '.join(data.labels)}."
    )
  return label


def _read(data, split, key, rename=lambda names: names):
  """The split's files -> Records.

  `key`: the field that names the images. `rename`: those names -> below config.data.image_root.
  """
  records, path_of = packed.Packed(("images", "id", "sentence", "label")), annotations.ImagePaths()
  keys = ("sentence", key, "label") if split == "train" else ("sentence", key)
  for entry, where in annotations.split_entries(data, split, keys, ("label", "id")):
    annotations.require_texts(entry, ("sentence",), where)
    names = rename(_images(entry, key, data.images_per_text, where))
    records.append(
      {
        "images": [path_of(data.image_root, "image_root", name, where) for name in names],
        "id": entry.get("id", len(records)),
        "sentence": entry["sentence"],
        "label": _label(entry, data, where),
      }
    )
  return Records(records)


def nlvr2(data, split):
  there = (
    None  # whether training images are where they are said to be; the first one answers for all
  )

  def rename(
    names,
  ):  # the official code reads all training images from one folder, whatever the names say
    nonlocal there
    if "train" not in names[0]:
      return names
    if there is None:
      there = archives.is_file(os.path.join(data.image_root or "", names[0]))
    return names if there else [f"train/{os.path.basename(name)}" for name in names]

  return _read(data, split, "images", rename)


def snli_ve(data, split):
  return _read(data, split, "image", lambda names: [f"{name}.jpg" for name in names])


def jsonl(data, split):
  return _read(data, split, "image" if data.images_per_text == 1 else "images")


def caption_pairs(data, split):
  records, path_of = packed.Packed(("image", "image_id", "captions")), annotations.ImagePaths()
  for entry, where in annotations.split_entries(data, split, ("image", "caption")):
    annotations.require_texts(entry, ("image",), where)
    captions = annotations.text_list(entry, "caption", where)
    if not captions:
      raise ValueError(f"{where}: the list of captions is empty.")
    records.append(
      {
        "image": path_of(data.image_root, "image_root", entry["image"], where),
        "image_id": entry["image"],
        "captions": captions,
      }
    )
  return text_assignment.TextAssignment(records, data.labels, data.seed)
