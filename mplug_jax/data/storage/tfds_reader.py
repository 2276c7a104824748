"""Random access to the fields of a TensorFlow Datasets set prepared as array_record.

A set is read from its files alone, without TensorFlow, and of a record only the requested fields;
images stay encoded until our decoder reads them. A field is named by its path, as captions/text for
the field text of the sequence captions. config.data.fields names the fields of other sets,
"caption=captions/raw,image=photo"; FIELDS has those that need no setting.

Own code rather than the decoders of tensorflow_datasets: no TensorFlow, only the requested fields.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mplug_jax.data.errors import BadRecords, RecordError
from mplug_jax.data.storage import annotations
from mplug_jax.data.text import unicode

# Name of a set -> {our key: path}.
FIELDS = {
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

  Can be sent to other processes, which open its files again.

  Attributes:
    name: full name of the set.
    split: name of the split in the set.
  """

  def __init__(
    self,
    data: Mapping[str, Any],
    split: str,
    required: Sequence[str],
    optional: Sequence[str],
  ):
    """Opens a split.

    Args:
      data: config.data with builder, data_dir, splits and fields.
      split: "train", "val" or "test".
      required: our keys of the fields that the set must have.
      optional: our keys of other fields.

    Raises:
      ValueError: no set is named, it is prepared in another format, or has no such split or field.
      FileNotFoundError: it is not prepared.
    """
    keys = ("name", "builder", "data_dir", "splits", "fields", "strict")
    settings = {key: data.get(key) for key in keys}
    self._arguments = (settings, split, required, optional)
    self._open()

  def __getstate__(self) -> tuple:
    return self._arguments

  def __setstate__(self, state: tuple) -> None:
    self._arguments = state
    self._open()

  def _open(self) -> None:
    """Opens the files of the split."""
    from tensorflow_datasets import decode, features

    data, split, required, optional = self._arguments
    self._invalid = BadRecords(bool(data["strict"]), "U+FFFD takes the place of wrong bytes.")
    builder = _builder(data)
    formats = sorted(form.value for form in builder.info.available_file_formats())
    if "array_record" not in formats:
      raise ValueError(
        f"{builder.data_path} is prepared as {', '.join(formats)}; prepare it again with "
        f'file_format="array_record".'
      )
    self.name = builder.info.full_name
    self.split = _split_name(data, split, builder)
    self._records = builder.as_data_source(
      self.split,
      file_format="array_record",
      deserialize_method=decode.DeserializeMethod.RAW_BYTES,
    )
    self._paths = self._find_fields(builder.info.features, data, required, optional)
    image = _find(builder.info.features, self._paths["image"])
    if not isinstance(image, features.Image):
      raise ValueError(
        f"{self.name}: {self._paths['image']} is no Image but a {type(image).__name__}."
      )

  def _find_fields(
    self,
    features: Any,
    data: Mapping[str, Any],
    required: Sequence[str],
    optional: Sequence[str],
  ) -> dict[str, str]:
    """Returns {our key: path} of the fields that the set has."""
    fields = annotations.Fields(
      {"fields": data["fields"] or "", "name": "tfds"}, required, ("image", *optional)
    )
    defaults = FIELDS.get(self.name.split("/")[0], {})
    paths: dict[str, str] = {}
    for key in fields.known:
      named = fields.file_key(key)
      path = named if named != key else defaults.get(key, key)
      if _find(features, path) is not None:
        paths[key] = path
      elif key in required or named != key:
        known = sorted(_paths(features))
        more = " ..." if len(known) > _LISTED else ""
        raise ValueError(
          f"{self.name} has no field {path!r} for our {key}; it has {', '.join(known[:_LISTED])}"
          f"{more}; name it with --config.data.fields={key}=..."
        )
    return paths

  def __len__(self) -> int:
    return len(self._records)

  def texts(self, values: Sequence[Any], location: str) -> list[str]:
    """Returns the values of a field as strings; those that are not UTF-8 are counted and repaired.

    Args:
      values: bytes, strings or numbers.
      location: the record, for messages.

    Raises:
      RecordError: a text is not UTF-8, if config.data.strict is set.
    """
    texts: list[str] = []
    for value in values:
      if isinstance(value, bytes):
        try:
          value = unicode.decode(value, location)
        except ValueError:
          self._invalid.add(RecordError(f"{location}: a text is not UTF-8."))
          value = unicode.without_mark(value.decode("utf-8", "replace"))
      texts.append(str(value))
    return texts

  def read(self, index: int, *keys: str) -> dict[str, list]:
    """Reads fields of a record.

    The record is a tf.train.Example, which stores a sequence as a list, and a sequence in a
    sequence as a list with the lengths of its parts.

    Args:
      index: the record.
      *keys: our keys of the fields.

    Returns:
      {our key: list of the values} of those fields that exist; of a sequence in a sequence, a list
      of lists.

    Raises:
      ValueError: the record is damaged.
    """
    from google.protobuf import message
    from tensorflow_datasets.proto import tf_example_pb2

    try:
      # protobuf makes the class at run time
      example_type = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
      example = example_type.FromString(self._records[index])
    except (RuntimeError, message.DecodeError) as error:
      reason = str(error).splitlines()[0].rstrip(".")
      raise ValueError(
        f"Record {index} of {self.name}, split {self.split}, is damaged ({reason})."
      ) from None
    stored = example.features.feature
    fields: dict[str, list] = {}
    for key in filter(self._paths.get, keys):
      path = self._paths[key]
      if path in stored:
        fields[key] = _values(stored[path])
      elif f"{path}/ragged_flat_values" in stored:
        values = iter(_values(stored[f"{path}/ragged_flat_values"]))
        fields[key] = [
          list(itertools.islice(values, length))
          for length in _values(stored[f"{path}/ragged_row_lengths_0"])
        ]
    return fields


def _builder(data: Mapping[str, Any]) -> Any:
  """Returns the builder of config.data, from the files that it prepared."""
  try:
    from tensorflow_datasets.core import constants, read_only_builder, registered
  except ImportError as error:
    raise ValueError(f"data=tfds:NAME needs the package tensorflow-datasets ({error}).") from None
  if not data["builder"]:
    raise ValueError(
      "config.data.builder is not set: write data=tfds:NAME, NAME/CONFIG or NAME:VERSION."
    )
  folder = os.path.expanduser(data["data_dir"]) if data["data_dir"] else None
  try:
    return read_only_builder.builder_from_files(data["builder"], data_dir=folder)
  except registered.DatasetNotFoundError:
    raise FileNotFoundError(
      f"{data['builder']} is not prepared in {folder or constants.DATA_DIR}; name the folder with "
      'root=, or prepare it with file_format="array_record" (docs/shards.md).'
    ) from None
  except (ValueError, OSError) as error:  # a malformed name, damaged files
    reason = str(error).splitlines()[0].rstrip(".")
    raise ValueError(f"{data['builder']} of TFDS cannot be read: {reason}.") from None


def _split_name(data: Mapping[str, Any], split: str, builder: Any) -> str:
  """Returns the split of a set that serves as ours; raises ValueError."""
  if len(data["splits"]) != 3:
    raise ValueError(
      f"config.data.splits={data['splits']!r} must name three splits, those to train, validate "
      "and test on."
    )
  named = data["splits"][("train", "val", "test").index(split)]
  if named == split:
    named = next((name for name in _ALIASES.get(split, ()) if name in builder.info.splits), named)
  try:
    builder.info.splits[named]  # also train[:90%] and train+restval
  except (KeyError, ValueError):
    raise ValueError(
      f"{builder.info.full_name} has no split {named!r} for our {split}; it has "
      f"{', '.join(builder.info.splits)}; name one in config.data.splits."
    ) from None
  return named


def _inner(feature: Any) -> Any:
  """Returns the features in a dict or in a sequence of dicts, or None if there are none."""
  feature = getattr(feature, "feature", feature)
  return feature if hasattr(feature, "keys") else None


def _find(features: Any, path: str) -> Any:
  """Returns the feature at a path, or None; names may contain "/", as image/id does."""
  children = _inner(features) or {}
  if path in children:
    return children[path]
  for name in children:
    if path.startswith(f"{name}/"):
      feature = _find(children[name], path[len(name) + 1 :])
      if feature is not None:
        return feature
  return None


def _paths(features: Any) -> Iterator[str]:
  """Yields all paths of a set."""
  for name, feature in (_inner(features) or {}).items():
    if _inner(feature) is None:
      yield name
    else:
      yield from (f"{name}/{rest}" for rest in _paths(feature))


def _values(feature: Any) -> list:
  """Returns the values of a tf.train.Feature."""
  return list(getattr(feature, feature.WhichOneof("kind") or "bytes_list").value)
