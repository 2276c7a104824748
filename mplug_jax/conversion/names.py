"""Detection of the format of tensors, and their names in the conversion tables."""

import collections
import json
import pathlib
import re

from mplug_jax.conversion import formats

_WRAPPERS = (r"^(module|model)\.", "")  # DistributedDataParallel, DeepSpeed, ModelScope


def official_name(key):
  """One name of a file -> the name in the official fine-tuning code (docs/official.md item 18)."""
  rules = (_WRAPPERS, *(rename for fmt in formats.FORMATS for rename in fmt.renames))
  while True:
    renamed = key
    for regex, replacement in rules:
      renamed = re.sub(regex, replacement, renamed)
    if renamed == key:
      return key
    key = renamed


def source_kind(names):
  """Name of the format whose tensors these are, by their names in the file.

  Raises:
    ValueError: none of these, or several at once.
  """
  names = [official_name(name) for name in names]
  found = [fmt for fmt in formats.FORMATS if any(re.match(fmt.sign, name) for name in names)]
  known = "; ".join(fmt.title for fmt in formats.FORMATS)
  if not found:
    starts = sorted({name.split(".")[0] for name in names})
    raise ValueError(
      f"These tensors fit no known format: their names begin with "
      f"{', '.join(starts[:8])}"
      f"{', ...' * (len(starts) > 8)}; convertible are {known}."
    )
  if len(found) > 1:
    raise ValueError(
      f"These tensors are of several models at once: {' and '.join(fmt.title for fmt in found)}; "
      "convert each from a file of its own."
    )
  return found[0].name


def official_names(keys):
  """Names of a file -> {name of the conversion tables: name in the file}.

  Raises:
    ValueError: see `source_kind`, or two names mean the same tensor.
  """
  names, keys = collections.defaultdict(list), list(keys)
  kind = source_kind(keys)
  source = next(fmt for fmt in formats.FORMATS if fmt.name == kind)
  regex, prefix = source.bare, source.prefix
  for key in keys:
    name = official_name(key)
    names[prefix + name if re.match(regex, name) else name].append(key)
  if twice := [found for found in names.values() if len(found) > 1]:
    raise ValueError(
      f"{len(twice)} tensors come under two names, for example {' and '.join(twice[0])}; keep one of each."
    )
  return {name: found[0] for name, found in names.items()}


def config_beside(path):
  """What Hugging Face's config.json in the folder, or beside the file, says of heads: fields for `infer_geometry`, or {}.

  Args:
    path: file or folder of a checkpoint.

  Raises:
    ValueError: it cannot be read, or describes an activation that our layers do not compute.
  """
  path = pathlib.Path(path)
  file = (path if path.is_dir() else path.parent) / "config.json"
  try:
    config = json.loads(file.read_text(encoding="utf-8"))
    family = str(config.get("model_type")).partition("_")[0]  # clip, clip_vision_model
    source = next((fmt for fmt in formats.FORMATS if fmt.family == family), None)
    if source is None:
      return {}
    config = config.get(source.config_section) or config
    heads, width = (
      config.get("num_attention_heads", 12),
      config.get("hidden_size", 768),
    )  # transformers' own defaults
    if type(heads) is not int or heads < 1 or type(width) is not int:
      raise ValueError(f"num_attention_heads {heads!r}, hidden_size {width!r}")
  except FileNotFoundError:
    return {}
  except (ValueError, TypeError, AttributeError, OSError, RecursionError) as error:
    raise ValueError(
      f"{file} is no configuration of a model ({type(error).__name__}: {error}); correct or rename it."
    ) from error
  activation = config.get("hidden_act", source.activation)
  if activation != source.activation:
    raise ValueError(
      f"{file}: hidden_act is {activation!r}, our layers compute {source.activation!r}: the converted model would not be "
      "this one; rename the file to convert it all the same."
    )
  return source.config_fields(heads, width)
