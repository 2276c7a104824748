"""Random access to the fields of a set of TensorFlow Datasets that is prepared as array_record.

Without TensorFlow.

A set is read from its files alone, and of a record only the fields that are wanted; images stay
encoded until our own decoder reads them. A field is named by its path, as captions/text for the
field text of the sequence captions. config.data.fields names those that are called otherwise,
"caption=captions/raw,image=photo"; what is known without it is in FIELDS.
"""

import itertools
import os

from mplug_jax.data.storage import annotations

FIELDS = {  # of a set, by its name: {our key: path}
  "coco_captions": {"caption": "captions/text", "image_id": "image/id"},
  "ref_coco": {
    "text": "objects/refexp/raw",
    "box": "objects/bbox",
    "image_id": "image/id",
    "id": "objects/refexp/refexp_id",
  },
  "mplug_captions": {"caption": "captions/text"},
  "mplug_questions": {
    "question": "questions/question",
    "answer": "questions/answer",
    "question_id": "questions/id",
  },
  "mplug_boxes": {"text": "objects/text", "box": "objects/bbox", "id": "objects/id"},
}
_ALIASES = {"val": ("val", "validation"), "test": ("test",)}
_LISTED = 20  # fields that a message names


class Split:
  """Random access to some fields of one split.

  Can be sent to other processes, which open its files anew.

  Args:
    data: config.data with builder, data_dir, splits and fields. split: "train", "val" or "test".
    required, optional: our keys of fields.

  Raises:
    ValueError: no set is named, it is prepared in another format, or has no such split or field.
    FileNotFoundError: it is not prepared.
  """

  def __init__(self, data, split, required, optional):
    self._arguments = (
      {key: data.get(key) for key in ("name", "builder", "data_dir", "splits", "fields")},
      split,
      required,
      optional,
    )
    self._open()

  def __getstate__(self):
    return self._arguments

  def __setstate__(self, state):
    self._arguments = state
    self._open()

  def _open(self):
    from tensorflow_datasets import decode, features

    data, split, required, optional = self._arguments
    builder = _builder(data)
    if "array_record" not in (
      formats := sorted(found.value for found in builder.info.available_file_formats())
    ):
      raise ValueError(
        f"{builder.data_path} is prepared as {', '.join(formats)}; prepare it anew with "
        f'file_format="array_record".'
      )
    self.name, self.split = builder.info.full_name, _split_name(data, split, builder)
    self._records = builder.as_data_source(
      self.split, file_format="array_record", deserialize_method=decode.DeserializeMethod.RAW_BYTES
    )
    self._paths = self._find_fields(builder.info.features, data, required, optional)
    image = _find(builder.info.features, self._paths["image"])
    if not isinstance(image, features.Image):
      raise ValueError(
        f"{self.name}: {self._paths['image']} is no Image but a {type(image).__name__}."
      )

  def _find_fields(self, features, data, required, optional):
    """{our key: path} of the fields that are there."""
    fields = annotations.Fields(
      {"fields": data["fields"] or "", "name": "tfds"}, required, ("image", *optional)
    )
    defaults, found = FIELDS.get(self.name.split("/")[0], {}), {}
    for key in fields.known:
      named = fields.theirs(key)
      path = named if named != key else defaults.get(key, key)
      if _find(features, path) is not None:
        found[key] = path
      elif key in required or named != key:
        known = sorted(_paths(features))
        raise ValueError(
          f"{self.name} has no field {path!r} for our {key}; it has {', '.join(known[:_LISTED])}"
          f"{' ...' * (len(known) > _LISTED)}; name it with --config.data.fields={key}=..."
        )
    return found

  def __len__(self):
    return len(self._records)

  def read(self, index, *keys):
    """{our key: list of the values} of those fields of a record that exist.

    Of a sequence in a sequence, a list of lists.

    The record is a tf.train.Example, in which a sequence is a list, and one in another a list with
    the lengths of its parts.

    Raises:
      ValueError: it is damaged.
    """
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_pb2

    try:
      there = tf_example_pb2.Example.FromString(self._records[index]).features.feature
    except (RuntimeError, message.DecodeError) as error:
      what = str(error).splitlines()[0].rstrip(".")
      raise ValueError(
        f"Record {index} of {self.name}, split {self.split}, is damaged ({what})."
      ) from None
    found = {}
    for key in filter(self._paths.get, keys):
      path = self._paths[key]
      if path in there:
        found[key] = _values(there[path])
      elif f"{path}/ragged_flat_values" in there:
        values = iter(_values(there[f"{path}/ragged_flat_values"]))
        found[key] = [
          list(itertools.islice(values, length))
          for length in _values(there[f"{path}/ragged_row_lengths_0"])
        ]
    return found


def _builder(data):
  """The builder of config.data, from the files that it prepared."""
  try:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder
  except ImportError as error:
    raise ValueError(f"data=tfds:NAME needs the package tensorflow-datasets ({error}).") from None
  if not data["builder"]:
    raise ValueError(
      "config.data.builder is not set: write data=tfds:NAME, NAME/CONFIG or NAME:VERSION."
    )
  place = os.path.expanduser(data["data_dir"]) if data["data_dir"] else None
  try:
    return read_only_builder.builder_from_files(data["builder"], data_dir=place)
  except tfds.core.registered.DatasetNotFoundError:
    raise FileNotFoundError(
      f"{data['builder']} is not prepared in {place or tfds.core.constants.DATA_DIR}; name the "
      f"folder with root=, or "
      'prepare it with file_format="array_record" (docs/shards.md).'
    ) from None
  except (ValueError, OSError) as error:  # a malformed name, damaged files
    raise ValueError(
      f"{data['builder']} of TFDS cannot be read: {str(error).splitlines()[0].rstrip('.')}."
    ) from None


def _split_name(data, split, builder):
  """The split of a set that serves as ours, checked."""
  if len(data["splits"]) != 3:
    raise ValueError(
      f"config.data.splits={data['splits']!r} must name three splits, those to train, validate "
      f"and test on."
    )
  named = dict(zip(("train", "val", "test"), data["splits"]))[split]
  if named == split:
    named = next((name for name in _ALIASES.get(split, ()) if name in builder.info.splits), named)
  try:
    builder.info.splits[named]  # also train[:90%] and train+restval
  except (KeyError, ValueError):
    raise ValueError(
      f"{builder.info.full_name} has no split {named!r} for our {split}; it has "
      f"{', '.join(builder.info.splits)}; name one "
      "in config.data.splits."
    ) from None
  return named


def _inner(feature):
  """The features that a path goes on in: of a dict, or of a sequence of dicts.

  None if there are none.
  """
  feature = getattr(feature, "feature", feature)
  return feature if hasattr(feature, "keys") else None


def _find(features, path):
  """The feature at a path, whose names may themselves be written with "/", as image/id is.

  None if there is none.
  """
  inside = _inner(features) or {}
  if path in inside:
    return inside[path]
  return next(
    (
      found
      for name in inside
      if path.startswith(f"{name}/")
      and (found := _find(inside[name], path[len(name) + 1 :])) is not None
    ),
    None,
  )


def _paths(features):
  """All paths of a set."""
  for name, feature in (_inner(features) or {}).items():
    if _inner(feature) is None:
      yield name
    else:
      yield from (f"{name}/{rest}" for rest in _paths(feature))


def _values(feature):
  """A tf.train.Feature -> list."""
  return list(getattr(feature, feature.WhichOneof("kind") or "bytes_list").value)


def texts(values, where):
  """Values of a field -> list of strings. Raises ValueError."""
  try:
    return [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values]
  except UnicodeDecodeError:
    raise ValueError(f"{where}: a text is not UTF-8.") from None
