"""--config and --config.section.key flags of the command line."""

import re
from collections.abc import Sequence
from typing import Any

from mplug_jax.config.arguments import config_file
from mplug_jax.config.resume import RENAMED_KEYS, RENAMED_VALUES


def resolve_config_flag(argv: Sequence[str]) -> list[str]:
  """Replaces names in a command line: packaged configs, and config keys of earlier versions.

  A packaged config, as in --config=vqa:tiny, becomes its file. Flags as --config.data.easier=0.5
  get today's names of keys and values.

  Args:
    argv: the command line.

  Returns:
    The command line with the names replaced.

  Raises:
    FileNotFoundError: there is neither such a file nor such a packaged config.
  """
  resolved = [_rename_flag(arg) for arg in argv]
  for i, arg in enumerate(argv):
    flag, equals, value = arg.partition("=")
    if flag not in ("-config", "--config"):
      continue
    position = i if equals else i + 1
    if position == len(argv):
      continue
    name, colon, rest = (value if equals else argv[position]).partition(":")
    prefix = f"{flag}=" if equals else ""
    resolved[position] = prefix + config_file(name) + colon + rest
  return resolved


def _rename_flag(arg: str) -> str:
  """Returns a --config.KEY=VALUE flag with today's names of its key and value."""
  parts = re.fullmatch(r"(--?config\.)([^=]*)(=?)(.*)", arg, re.DOTALL)
  if not parts:
    return arg
  prefix, key, equals, value = parts.groups()
  key = RENAMED_KEYS.get(key, key)
  return prefix + key + equals + RENAMED_VALUES.get(key, {}).get(value, value)


def unknown_key(argv: Sequence[str], config: Any) -> str | None:
  """Returns a message about the first --config.a.b flag that `config` lacks, or None.

  Args:
    argv: the command line.
    config: ConfigDict that --config names.
  """
  for arg in argv:
    path = re.match(r"--?(config\.[^=]*)", arg)
    if not path:
      continue
    section, *keys = path[1].split(".")
    values = config
    for key in keys:
      if not hasattr(values, "keys"):
        return f"{arg}: {section} is a value and has no keys."
      if key not in values:
        return f"{arg}: {section} has no key {key!r}; it has {', '.join(sorted(values.keys()))}."
      section = f"{section}.{key}"
      values = values[key]
  return None
