"""The array type of annotations."""

from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
  Array = jax.Array
else:
  # Functions take NumPy arrays as those of JAX do. The type checker does not know this: it would
  # also expect NumPy arrays as results.
  Array = jax.Array | np.ndarray
