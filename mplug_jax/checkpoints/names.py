"""Names of parameters: the module a parameter belongs to, and short lists for messages."""

import collections


def module_of(path):
  """The part of the model that a leaf belongs to; a checkpoint holds all of a part or nothing."""
  return (
    "/".join(path.split("/")[:2])
    if path.startswith("fusion_encoder/mlm_head")
    else path.split("/")[0]
  )


def grouped(names, separator: str = "/") -> str:
  """Up to three names.

  More of them counted by their first three components: "params/text_decoder/layers (26), rng".
  """
  names = list(names)
  if len(names) <= 3:
    return ", ".join(sorted(names))
  counts = collections.Counter(separator.join(name.split(separator)[:3]) for name in names)
  shown = [f"{name} ({n})" if n > 1 else name for name, n in sorted(counts.items())]
  return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more groups" if len(shown) > 12 else "")
