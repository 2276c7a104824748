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
  resolved = _rename_flags(argv)
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


def _rename_flags(argv: Sequence[str]) -> list[str]:
  """Returns a command line with today's names of keys and values in --config.KEY=VALUE flags."""
  renamed = []
  key = ""  # of a flag whose value is the next argument
  for arg in argv:
    flag = re.fullmatch(r"(--?(?:no)?config\.)([^=]*)(=?)(.*)", arg, re.DOTALL)
    if not flag:
      renamed.append(RENAMED_VALUES.get(key, {}).get(arg, arg))
      key = ""
      continue
    prefix, name, equals, value = flag.groups()
    key = RENAMED_KEYS.get(name, name)
    renamed.append(prefix + key + equals + RENAMED_VALUES.get(key, {}).get(value, value))
    if equals:
      key = ""
  return renamed


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
