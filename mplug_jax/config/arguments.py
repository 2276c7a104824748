"""The config argument: what follows the colon of --config=configs/vqa.py:base,data=jsonl."""

import importlib
import importlib.util
import os

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


def parse_arg(arg, **spec):
  """Parses "base,res=384,data=vqa_v2" against `spec`, {name: default}, whose values also give the types.

  The first part without "=" is the size, a name in PRESETS. Booleans are written true or false, and a name alone, after
  the size, means true. Where `spec` has `data`, its value may go on behind a colon: data=jsonl:FILE, see own_files, data=folder:ROOT,
  data=shards:PATTERN, see own_shards, or data=tfds:NAME, see own_tfds.

  Returns:
    ConfigDict of `spec` with the given values, and `size`; with `data` also `file`, what jsonl, shards or tfds: names, or "".

  Raises:
    ValueError: an unknown name or size, or a value of another type; the message lists what there is.
  """
  values = ConfigDict({"size": "small", **spec})
  for i, part in enumerate(p.strip() for p in (arg or "").split(",") if p.strip()):
    name, equals, text = part.partition("=")
    if not equals and name in PRESETS and i == 0:
      values.size = name
      continue
    if name not in values:
      known = ", ".join(f"{k}={v}" for k, v in sorted(values.items()))
      raise ValueError(
        f"The config argument {part!r} is unknown. First a size, {', '.join(PRESETS)}; then any of {known}."
      )
    values[name] = _typed(name, text if equals else "true", spec.get(name, ""))
  if values.size not in PRESETS:
    raise ValueError(f"The size {values.size!r} is unknown; there are {', '.join(PRESETS)}.")
  if "data" in spec:
    values.file = ""
    given, (values.data, colon, path) = values.data, values.data.partition(":")
    if colon:
      place = {"jsonl": "file", "folder": "root", "shards": "file", "tfds": "file"}.get(values.data)
      if not place or not path:
        raise ValueError(
          f"The config argument data={given!r} must be data=jsonl:FILE, data=folder:FOLDER, data=shards:PATTERN or "
          "data=tfds:NAME; others take root=."
        )
      values[place] = path
  return values.lock()


def _typed(name, text, default):
  """`text` as the type of `default`."""
  if isinstance(default, bool):
    if text.lower() not in ("true", "false"):
      raise ValueError(f"The config argument {name}={text!r} must be true or false.")
    return text.lower() == "true"
  try:
    return type(default)(text)
  except ValueError:
    kind = "whole number" if isinstance(default, int) else "number"
    raise ValueError(f"The config argument {name}={text!r} must be a {kind}.") from None


def choose(table, data):
  """Returns the entry of `table` for the config argument data=...

  Raises:
    ValueError: there is no such entry; the message lists all.
  """
  if data not in table:
    raise ValueError(f"The config argument data={data!r} is unknown; there are {', '.join(table)}.")
  return table[data]


def config_file(name):
  """Returns the file of a config: `name` itself if it is a file, else the packaged config of that name.

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
    f"The config {name} does not exist. Name a file, or one of the packaged configs: {', '.join(known)}."
  )


def load(name):
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
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)
