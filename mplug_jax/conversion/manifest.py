"""The manifest of a conversion: where each tensor went."""

import collections

import numpy as np


def manifest_beside(dest):
  """Where `export_torch` writes its manifest."""
  return f"{dest}.manifest.json"


# ---- manifests as text


def _what(row):
  return "mapped" if row["action"] == "map" else f"{row['action']}: {row['why']}"


def summary(manifest):
  """Manifest -> lines of text: how many tensors and numbers were mapped, dropped (why) or made."""
  counts, sizes = collections.Counter(), collections.Counter()
  for row in manifest["tensors"]:
    counts[_what(row)] += 1
    sizes[_what(row)] += int(np.prod(row["shape"]))
  return [
    f"{counts[what]:6d} tensors {sizes[what] / 1e6:9.2f} million  {what}" for what in sorted(counts)
  ]


def tensor_lines(manifest):
  """Manifest of a conversion -> one line of text for each tensor: its key, dtype and shape, and where it went or why nowhere."""
  lines = []
  for row in manifest["tensors"]:
    why = f" ({row['why']})" if row["to"] and row["why"] else ""
    where = f"-> {', '.join(row['to'])}{why}" if row["to"] else _what(row)
    lines.append(f"{row['key']} {row['dtype']}{row['shape']} {where}")
  return lines
