"""Manifest of a conversion: the destination of each tensor."""

import collections
import os
from collections.abc import Mapping
from typing import Any

import numpy as np


def manifest_beside(dest: str | os.PathLike) -> str:
  """Returns the path of the manifest of an exported file."""
  return f"{dest}.manifest.json"


# ---- manifests as text


def _outcome(row: Mapping[str, Any]) -> str:
  return "mapped" if row["action"] == "map" else f"{row['action']}: {row['why']}"


def summary(manifest: Mapping[str, Any]) -> list[str]:
  """Returns lines of text with the number of tensors and values per outcome."""
  counts = collections.Counter()
  sizes = collections.Counter()
  for row in manifest["tensors"]:
    counts[_outcome(row)] += 1
    sizes[_outcome(row)] += int(np.prod(row["shape"]))
  return [
    f"{counts[outcome]:6d} tensors {sizes[outcome] / 1e6:9.2f} million  {outcome}"
    for outcome in sorted(counts)
  ]


def tensor_lines(manifest: Mapping[str, Any]) -> list[str]:
  """Returns one line of text for each tensor: key, dtype, shape, and target or reason for none."""
  lines = []
  for row in manifest["tensors"]:
    why = f" ({row['why']})" if row["to"] and row["why"] else ""
    outcome = f"-> {', '.join(row['to'])}{why}" if row["to"] else _outcome(row)
    lines.append(f"{row['key']} {row['dtype']}{row['shape']} {outcome}")
  return lines
