"""Damage to a checkpoint on disk that Orbax does not survive, or does not see."""

import json


def is_json(path):
  """Whether the file holds json."""
  try:
    json.loads(path.read_bytes())
  except ValueError:
    return False
  return True


def check_metadatas(state):
  """Raises FileNotFoundError if arrays in the folder `state` lost the files that tell typed random keys from other numbers: Orbax would
  restore wrong keys without a word.
  """
  for arrays in state.glob("ocdbt.process_*"):
    metadata = state / "array_metadatas" / arrays.name.removeprefix("ocdbt.")
    if not metadata.exists():
      raise FileNotFoundError(f"{metadata} is missing")
