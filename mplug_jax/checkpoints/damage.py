"""Detects damage to a checkpoint on disk that Orbax does not handle or does not notice."""

import json

from etils import epath


def is_json(path: epath.Path) -> bool:
  """Returns whether the file contains JSON.

  Args:
    path: file.
  """
  try:
    json.loads(path.read_bytes())
  except ValueError:
    return False
  return True


def check_metadatas(state: epath.Path) -> None:
  """Checks that the array metadata exist, without which Orbax silently restores wrong random keys.

  Args:
    state: item `state` of a checkpoint.

  Raises:
    FileNotFoundError: metadata of some arrays are missing.
  """
  for arrays in state.glob("ocdbt.process_*"):
    metadata = state / "array_metadatas" / arrays.name.removeprefix("ocdbt.")
    if not metadata.exists():
      raise FileNotFoundError(f"{metadata} is missing")
