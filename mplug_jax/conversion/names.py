"""Detection of the format of tensors, and their names in the conversion tables."""

import collections
import functools
import json
import os
import pathlib
import re
from collections.abc import Collection, Iterable

from mplug_jax.conversion import formats
from mplug_jax.conversion.formats.format import Geometry

_WRAPPERS = (r"^(module|model)\.", "")  # DistributedDataParallel, DeepSpeed, ModelScope


@functools.lru_cache(maxsize=8192)  # a conversion asks for each tensor several times
def official_name(key: str) -> str:
  """Returns the name of a tensor in the official fine-tuning code (docs/official.md item 18)."""
  rules = (_WRAPPERS, *(rename for fmt in formats.FORMATS for rename in fmt.renames))
  while True:
    renamed = key
    for regex, replacement in rules:
      renamed = re.sub(regex, replacement, renamed)
    if renamed == key:
      return key
    key = renamed


def source_kind(names: Iterable[str]) -> str:
  """Detects the format of a file from its tensor names; returns the format's name.

  Raises:
    ValueError: the names fit no format, or several.
  """
  names = [official_name(name) for name in names]
  matches = [fmt for fmt in formats.FORMATS if any(re.match(fmt.sign, name) for name in names)]
  known = "; ".join(fmt.title for fmt in formats.FORMATS)
  if not matches:
    starts = sorted({name.split(".")[0] for name in names})
    listed = starts if len(starts) <= 8 else [*starts[:8], "..."]
    raise ValueError(
      f"These tensors fit no known format: their names begin with {', '.join(listed)}; "
      f"known formats are {known}."
    )
  if len(matches) > 1:
    raise ValueError(
      f"These tensors belong to several models: {' and '.join(fmt.title for fmt in matches)}; "
      "convert each from a separate file."
    )
  return matches[0].name


def official_names(keys: Collection[str]) -> dict[str, str]:
  """Returns {table name: name in the file} for the tensor names of a file.

  Raises:
    ValueError: the names fit no single format, or two names mean the same tensor.
  """
  names = collections.defaultdict(list)
  kind = source_kind(keys)
  source = next(fmt for fmt in formats.FORMATS if fmt.name == kind)
  for key in keys:
    name = official_name(key)
    names[source.prefix + name if re.match(source.bare, name) else name].append(key)
  if twice := [same for same in names.values() if len(same) > 1]:
    raise ValueError(
      f"{len(twice)} tensors have two names, for example {' and '.join(twice[0])}; "
      "keep one of each."
    )
  return {name: same[0] for name, same in names.items()}


def config_beside(path: str | os.PathLike) -> Geometry:
  """Reads the attention heads from Hugging Face's config.json in the folder or beside the file.

  Args:
    path: file or folder of a checkpoint.

  Returns:
    Fields for `infer_geometry`; {} without a config.json of a known model.

  Raises:
    ValueError: it cannot be read, or its activation is not the one of our layers.
  """
  path = pathlib.Path(path)
  file = (path if path.is_dir() else path.parent) / "config.json"
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
    family = str(config.get("model_type")).partition("_")[0]  # clip, clip_vision_model
    source = next((fmt for fmt in formats.FORMATS if fmt.family == family), None)
    if source is None or source.config_fields is None:
      return {}
    config = config.get(source.config_section) or config
    heads = config.get("num_attention_heads", 12)  # the defaults of transformers
    width = config.get("hidden_size", 768)
    if type(heads) is not int or heads < 1 or type(width) is not int:
      raise ValueError(f"num_attention_heads {heads!r}, hidden_size {width!r}")
  except FileNotFoundError:
    return {}
  except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
    raise ValueError(
      f"{file} is not a model configuration ({type(error).__name__}: {error}); "
      "correct or rename it."
    ) from error
  activation = config.get("hidden_act", source.activation)
  if activation != source.activation:
    raise ValueError(
      f"{file}: hidden_act is {activation!r}, but the converted model uses {source.activation!r}; "
      "rename the file to convert anyway."
    )
  return source.config_fields(heads, width)
