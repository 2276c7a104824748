"""Names of parameters: the module a parameter belongs to, and short lists for messages."""

import collections
from collections.abc import Iterable


def module_of(path: str) -> str:
  """Returns the part of the model that a parameter belongs to.

  A checkpoint has all parameters of a part or none.

  Args:
    path: name such as "text_decoder/layers/output/kernel".
  """
  parts = path.split("/")
  return "/".join(parts[:2]) if path.startswith("fusion_encoder/mlm_head") else parts[0]


def grouped(names: Iterable[str], separator: str = "/") -> str:
  """Returns up to three names, or counts by their first three components.

  Args:
    names: names of parameters.
    separator: separator of their components.

  Returns:
    Text such as "params/text_decoder/layers (26), rng".
  """
  names = list(names)
  if len(names) <= 3:
    return ", ".join(sorted(names))
  counts = collections.Counter(separator.join(name.split(separator)[:3]) for name in names)
  shown = [f"{name} ({n})" if n > 1 else name for name, n in sorted(counts.items())]
  return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more groups" if len(shown) > 12 else "")
