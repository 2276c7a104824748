"""The two sets of array operations that config.model.ops selects."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from mplug_jax.ops.attention import attention
from mplug_jax.ops.attention.reference import attention_reference
from mplug_jax.ops.dropout import dropout, dropout_reference
from mplug_jax.ops.initializers import normal, normal_reference
from mplug_jax.ops.layer_norm import normalize, normalize_reference
from mplug_jax.ops.linear import linear, linear_reference


class Ops(NamedTuple):
  """One implementation of every operation.

  Attributes:
    attention: see ops.attention.attention, of which the reference has no `attention_impl`.
    linear: (activation, x, kernel, bias) -> array.
    normalize: (x, scale, bias, epsilon) -> array.
    dropout: (x, rate, key) -> array.
    normal: (stddev) -> initializer.
  """

  attention: Callable[..., Any]
  linear: Callable[..., Any]
  normalize: Callable[..., Any]
  dropout: Callable[..., Any]
  normal: Callable[..., Any]


AUTO = Ops(attention, linear, normalize, dropout, normal)
REFERENCE = Ops(
  attention_reference,
  linear_reference,
  normalize_reference,
  dropout_reference,
  normal_reference,
)


def get(name: str, attention_impl: str = "auto") -> Ops:
  """Returns the operations of a model.

  Args:
    name: "auto" for the hand-written gradient rules, generators and kernels; "reference" for plain
      JAX, which gives the same values up to rounding and other random draws.
    attention_impl: see ops.attention.attention; "reference" operations ignore it.

  Raises:
    ValueError: the name is unknown.
  """
  if name == "reference":
    return REFERENCE
  if name != "auto":
    raise ValueError(f"config.model.ops={name!r} is not one of auto, reference.")
  return AUTO._replace(attention=functools.partial(attention, attention_impl=attention_impl))
