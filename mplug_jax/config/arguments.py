"""The argument of a config, as in --config=configs/vqa.py:base,data=jsonl."""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from mplug_jax.config.presets import PRESETS

# In the order in which a config looks for files.
SUFFIXES = (
  ".jsonl",
  ".json",
  ".csv",
  ".tsv",
  ".parquet",
  ".jsonl.gz",
  ".json.gz",
  ".csv.gz",
  ".tsv.gz",
)

# Names in the config argument of earlier versions -> today's.
_RENAMED = {"blank": "black_images"}


def parse_arg(arg: str | None, sources: Sequence[str] = (), **spec: Any) -> Any:
  """Parses the argument of a config, as "base,res=384,data=vqa_v2".

  The first part without "=" is the size, a name in PRESETS. Booleans are written true or false; a
  name without a value, after the size, means true. If `spec` has `data`, its value may continue
  after a colon: data=jsonl:FILE (own_files), data=folder:ROOT, data=shards:PATTERN (own_shards) or
  data=tfds:NAME (own_tfds).

  Args:
    arg: text after the colon of --config; None or "": the defaults.
    sources: valid values of data=; empty: any.
    **spec: known names with their defaults, whose types the values must have.

  Returns:
    Locked ConfigDict of `spec` with the given values, and `size`; with `data` also `file`, the text
    after jsonl:, shards: or tfds:, or "".

  Raises:
    ValueError: unknown name, size or source, or a value of another type; the message lists valid
      ones.
  """
  values: Any = ConfigDict({"size": "small", **spec})
  for i, part in enumerate(p.strip() for p in (arg or "").split(",") if p.strip()):
    name, equals, text = part.partition("=")
    if not equals and name in PRESETS and i == 0:
      values.size = name
      continue
    if name not in values:
      name = _RENAMED.get(name, name)
    if name not in values:
      known = ", ".join(f"{k}={v}" for k, v in sorted(values.items()))
      raise ValueError(
        f"The config argument {part!r} is unknown. First a size, {', '.join(PRESETS)}; "
        f"then any of {known}."
      )
    values[name] = _typed(name, text if equals else "true", spec.get(name, ""))
  if values.size not in PRESETS:
    raise ValueError(f"The size {values.size!r} is unknown; there are {', '.join(PRESETS)}.")
  if "data" in spec:
    values.file = ""
    argument = values.data
    values.data, colon, path = argument.partition(":")
    if colon:
      field = {"jsonl": "file", "folder": "root", "shards": "file", "tfds": "file"}.get(values.data)
      if not field or not path:
        raise ValueError(
          f"The config argument data={argument!r} must be data=jsonl:FILE, data=folder:FOLDER, "
          "data=shards:PATTERN or data=tfds:NAME; others take root=."
        )
      values[field] = path
    if sources and values.data not in sources:
      raise ValueError(
        f"The config argument data={values.data!r} is unknown; there are {', '.join(sources)}."
      )
  return values.lock()


def _typed(name: str, text: str, default: Any) -> Any:
  """Converts `text` to the type of `default`."""
  if isinstance(default, bool):
    if text.lower() not in ("true", "false"):
      raise ValueError(f"The config argument {name}={text!r} must be true or false.")
    return text.lower() == "true"
  try:
    return type(default)(text)
  except ValueError:
    kind = "whole number" if isinstance(default, int) else "number"
    raise ValueError(f"The config argument {name}={text!r} must be a {kind}.") from None


def config_file(name: str) -> str:
  """Returns `name` if it is a file, else the file of the packaged config of that name.

  Args:
    name: "configs/vqa.py", or "vqa" for the config that comes with the package.

  Raises:
    FileNotFoundError: there is neither such a file nor such a packaged config.
  """
  if os.path.isfile(name):
    return name
  known = []
  package = importlib.util.find_spec("configs")
  for folder in (package.submodule_search_locations or []) if package else []:
    known += sorted(f[:-3] for f in os.listdir(folder) if f.endswith(".py") and f[0] != "_")
    path = os.path.join(folder, f"{name}.py")
    if os.path.basename(name) == name and os.path.isfile(path):
      return path
  raise FileNotFoundError(
    f"The config {name} does not exist. Name a file, or one of the packaged configs: "
    f"{', '.join(known)}."
  )


def load(name: str) -> Any:
  """Builds the config that a command line names.

  Args:
    name: FILE or FILE:ARGUMENT, or the name of a packaged config in place of the file.

  Returns:
    ConfigDict, locked.

  Raises:
    FileNotFoundError: there is no such config.
    ValueError: the argument is wrong.
  """
  file, _, arg = name.partition(":")
  spec = importlib.util.spec_from_file_location("config_of_command_line", config_file(file))
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)
