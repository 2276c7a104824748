"""Types of sources, records and transforms."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np

# One entry of a source, read from files or generated: images, texts, ids.
Record: TypeAlias = dict[str, Any]

# Arrays of one record; shapes and dtypes are the same for all records.
Example: TypeAlias = dict[str, Any]

# (index, record, generator or None in evaluation) -> example
Transform: TypeAlias = Callable[[int, Any, np.random.Generator | None], Example]


class Source(Protocol):
  """Random access to the records of a split."""

  def __len__(self) -> int:
    """Number of records."""
    ...

  def __getitem__(self, index: int, /) -> Any:
    """Record number `index`."""
    ...
