"""Wrong shapes and dtypes raise while tests run: the jaxtyping hook of pyproject.toml."""

import jax.numpy as jnp
import pytest

from mplug_jax.decoding import tokens
from mplug_jax.losses import language_modeling
from mplug_jax.ops import layer_norm


@pytest.mark.parametrize(
  ("function", "shapes"),
  [
    (lambda x, y: layer_norm.normalize(x, y, y, 1e-5), [(2, 8), (4,)]),
    (lambda x: language_modeling.next_ids(x.astype(jnp.int32)), [(5,)]),
    (language_modeling.token_cross_entropy, [(2, 3, 7), (2, 3)]),  # labels are not integers
    (lambda x, y: tokens.take_beams(*(a.astype(jnp.int32) for a in (x, y))), [(2, 3, 4), (3, 1)]),
  ],
)
def test_wrong_shape_or_dtype_raises(function, shapes):
  with pytest.raises(TypeError, match="Type-check error"):
    function(*(jnp.zeros(shape) for shape in shapes))
