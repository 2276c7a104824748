"""GELU and QuickGELU with their derivatives, for the gradient rule of ops.linear."""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from mplug_jax.arrays import Array


@dataclasses.dataclass(frozen=True)
class Activation:
  """An elementwise function.

  Attributes:
    function: the function.
    derivative: its derivative.
  """

  function: Callable[[jax.Array], jax.Array]
  derivative: Callable[[jax.Array], jax.Array]

  def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the function of every element."""
    return self.function(x)


def _quick_gelu_derivative(x):
  gate = nn.sigmoid(1.702 * x)
  return gate * (1.0 + 1.702 * x * (1.0 - gate))


def _gelu_derivative(x):
  return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5))) + x * jnp.exp(-0.5 * x * x) * (
    1.0 / math.sqrt(2 * math.pi)
  )


# x * sigmoid(1.702 x), the activation of CLIP.
quick_gelu = Activation(lambda x: x * nn.sigmoid(1.702 * x), _quick_gelu_derivative)


# Exact (erf) GELU, the activation of BERT. With erf rather than erfc, which JAX uses for precision
# far in the tail: half the time on CPU.
gelu = Activation(lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))), _gelu_derivative)
