"""Tasks: what to initialise, what to minimise, what to predict. One file each, found by name."""

import importlib
import pkgutil


def get(name):
  """The Task class called `name`, the module of that name in this package.

  Raises:
    ValueError: there is no such task; the message lists those there are.
  """
  known = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")
  if name not in known:
    raise ValueError(f"config.task.name={name!r} is not a task; there are: {', '.join(known)}.")
  return importlib.import_module(f"{__name__}.{name}").Task
