"""Scaled dot-product attention, heads first: the plain path, and faster forms of it chosen by platform and shape.

Shapes: B rows, H heads, L queries, S keys, Dh head width. The choice is made when a program is lowered
(`jax.lax.platform_dependent`), for the platform it is lowered for, not the one it is traced on. One `jax.export` for several
platforms at once needs "reference": JAX 0.10 lowers a Pallas kernel for all of them or none.

- CPU: a head at a time, so that its scores stay in the cache. The same arithmetic.
- TPU: the Pallas flash attention that comes with JAX, where no probabilities are dropped and no mask tells queries apart.
- GPU: cuDNN's, in half precision, without mask and dropout, when the program is traced on a machine with a GPU.
- Everything else: the plain path, three products and a softmax, which is the reference for all.
"""

import functools

import jax
import jax.numpy as jnp

from mplug_jax.ops.attention import cudnn
from mplug_jax.ops.attention.blocked_cpu import BLOCKED
from mplug_jax.ops.attention.common import FUSED_FROM
from mplug_jax.ops.attention.flash_tpu import FLASH
from mplug_jax.ops.attention.reference import PLAIN

BLOCKED_FROM = 2**16  # scores of a head from which it is worth a turn of a loop on CPU


def attention(query, key, value, mask=None, rate=0.0, rng=None, attention_impl="auto"):
  """Scaled dot-product attention.

  Args:
    query: f[B, H, L, Dh]. key, value: f[B, H, S, Dh].
    mask: bool, broadcastable to [B, H, L, S] and of four axes; True = may be attended to. None = all.
    rate, rng: dropout of the attention probabilities; rng None = off.
    attention_impl: "auto", or "reference" for the plain path everywhere.

  Returns:
    dtype[B, H, L, Dh] in the dtype of `value`. Scores and softmax are float32. A row whose keys are all masked gives
    the mean of all values.
  """
  mask, rng = None if mask is None else jnp.asarray(mask), rng if rate > 0.0 else None
  if attention_impl == "auto" and cudnn.fits(query, key, mask, rng):
    return cudnn.attention(query, key, value)
  return _attention(attention_impl, rate, query, key, value, mask, rng)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(attention_impl, rate, query, key, value, mask, rng):
  """Its own gradient rule keeps two numbers a row and computes the probabilities again: f32[B, H, L, S] costs more than that."""
  return _forward(attention_impl, rate, query, key, value, mask, rng)[0]


def _forward(attention_impl, rate, query, key, value, mask, rng):
  out, largest, inverse = _choose("forward", attention_impl, rate, query, key, value, mask, rng)
  return out, (query, key, value, mask, rng, out, largest, inverse)


def _backward(attention_impl, rate, saved, cotangent):
  return *_choose("backward", attention_impl, rate, *saved, cotangent), None, None


_attention.defvjp(_forward, _backward)


def _choose(direction, attention_impl, rate, query, key, value, mask, rng, *saved):
  """Runs a direction of the form that suits the shapes, on each platform its own."""
  forms = {} if attention_impl == "reference" else _forms(query, key, mask, rng)
  calls = {
    platform: functools.partial(getattr(form, direction), rate) for platform, form in forms.items()
  }
  plain = functools.partial(getattr(PLAIN, direction), rate)
  args = (query, key, value, mask, rng, *saved)
  return jax.lax.platform_dependent(*args, default=plain, **calls) if calls else plain(*args)


def _forms(query, key, mask, rng):
  """{platform: form other than the plain one}."""
  (rows, heads, length, _), keys, forms = query.shape, key.shape[2], {}
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
