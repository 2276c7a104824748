"""Scaled dot-product attention, heads first: a reference, and faster forms by platform and shape.

Shapes: B rows, H heads, L queries, S keys, Dh head width. The form is chosen when a program is
lowered (`jax.lax.platform_dependent`), for the platform it is lowered for, not the one it is traced
on. One `jax.export` for several platforms needs "reference": JAX 0.10 lowers a Pallas kernel for
all of them or none.

- CPU: a head at a time, so that its scores stay in the cache. The same arithmetic.
- TPU: JAX's Pallas flash attention, without dropout and without masks that differ between queries.
- GPU: cuDNN's, in half precision, without mask and dropout, when the program is traced on a machine
  with a GPU.
- Everything else: the reference, three products and a softmax.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.ops.attention import cudnn
from mplug_jax.ops.attention.blocked_cpu import BLOCKED
from mplug_jax.ops.attention.common import FUSED_FROM
from mplug_jax.ops.attention.flash_tpu import FLASH
from mplug_jax.ops.attention.reference import PLAIN

BLOCKED_FROM = 2**16  # minimum L x S per head for which looping over heads is faster on CPU


def attention(
  query: Float[Array, "batch heads length width"],
  key: Float[Array, "batch heads keys width"],
  value: Float[Array, "batch heads keys value_width"],
  mask: Bool[Array, "..."] | None = None,
  rate: float = 0.0,
  rng: PRNGKeyArray | None = None,
  attention_impl: str = "auto",
) -> Float[Array, "batch heads length value_width"]:
  """Returns scaled dot-product attention.

  Args:
    query: queries.
    key: keys.
    value: values.
    mask: four axes, broadcastable to [batch, heads, length, keys]; True = may be attended to.
      None: all.
    rate: dropout rate of the attention probabilities.
    rng: random key of the dropout; None: no dropout.
    attention_impl: "auto", or "reference" for the reference on every platform.

  Returns:
    Array in the dtype of `value`. Scores and softmax are float32. A row whose keys are all masked
    gives the mean of all values.
  """
  mask = None if mask is None else jnp.asarray(mask)
  rng = rng if rate > 0.0 else None
  if attention_impl == "auto" and cudnn.fits(query, key, mask, rng):
    return cudnn.attention(query, key, value)
  return _attention(attention_impl, rate, query, key, value, mask, rng)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(attention_impl, rate, query, key, value, mask, rng):
  """Attention with a gradient rule that keeps two numbers a row and recomputes the probabilities.

  Storing f32[B, H, L, S] costs more than recomputing it.
  """
  return _forward(attention_impl, rate, query, key, value, mask, rng)[0]


def _forward(attention_impl, rate, query, key, value, mask, rng):
  out, largest, inverse = _choose("forward", attention_impl, rate, query, key, value, mask, rng)
  return out, (query, key, value, mask, rng, out, largest, inverse)


def _backward(attention_impl, rate, saved, cotangent):
  return *_choose("backward", attention_impl, rate, *saved, cotangent), None, None


_attention.defvjp(_forward, _backward)


def _choose(direction, attention_impl, rate, query, key, value, mask, rng, *saved):
  """Runs one direction of the form that fits the platform and the shapes."""
  forms = {} if attention_impl == "reference" else _forms(query, key, mask, rng)
  calls = {
    platform: functools.partial(getattr(form, direction), rate) for platform, form in forms.items()
  }
  plain = functools.partial(getattr(PLAIN, direction), rate)
  args = (query, key, value, mask, rng, *saved)
  return jax.lax.platform_dependent(*args, default=plain, **calls) if calls else plain(*args)


def _forms(query, key, mask, rng):
  """Returns {platform: form other than the reference}."""
  rows, heads, length, _ = query.shape
  keys = key.shape[2]
  forms = {}
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty and (
    rows % (mesh.shape["data"] * mesh.shape["fsdp"]) or heads % mesh.shape["tensor"]
  ):
    return forms
  if length * keys >= BLOCKED_FROM and rows * heads > 1:
    forms["cpu"] = BLOCKED
  if (
    min(length, keys) >= FUSED_FROM
    and rng is None
    and (mask is None or mask.shape[1] == mask.shape[2] == 1)
  ):
    forms["tpu"] = FLASH
  return forms
