"""Scaled dot-product attention on channels: a reference, and faster forms by platform and shape.

Shapes: B rows, H heads, L queries, S keys, Dh head width. The form is chosen when a program is
lowered, for the platform it is lowered for, not the one it is traced on. `jax.export` saves no
program with Triton kernels, so that one for CUDA needs "reference".

- CPU: a head at a time, so that its scores stay in the cache. The same arithmetic.
- TPU: a Pallas kernel for each direction, with masks and dropout.
- GPU: Pallas kernels by Triton, with masks and dropout. Without both, in half precision, cuDNN's,
  when the program is traced on a machine with a GPU.
- Everything else: the reference, three products and a softmax.

All forms drop the same probabilities.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PRNGKeyArray

from mplug_jax.arrays import Array
from mplug_jax.ops.attention import cudnn, kernel_gpu, kernel_tpu
from mplug_jax.ops.attention.blocked_cpu import BLOCKED
from mplug_jax.ops.attention.common import Options
from mplug_jax.ops.attention.primitive import run

BLOCKED_FROM = 2**16  # minimum L x S per head for which looping over heads is faster on CPU
KERNEL_FROM = 8  # minimum number of queries for which the TPU kernel is used


def attention(
  query: Float[Array, "batch length channels"],
  key: Float[Array, "batch keys channels"],
  value: Float[Array, "batch keys channels"],
  heads: int,
  mask: Bool[Array, "rows keys"] | None = None,
  causal: bool = False,
  rate: float = 0.0,
  rng: PRNGKeyArray | None = None,
  attention_impl: str = "auto",
) -> Float[Array, "batch length channels"]:
  """Returns scaled dot-product attention.

  Args:
    query: queries; the channels are H heads of Dh.
    key: keys.
    value: values.
    heads: number of heads H.
    mask: keys that may be attended to, one row or one for each of the batch; None: all.
    causal: whether query i attends to keys 0 to i only.
    rate: dropout rate of the attention probabilities.
    rng: random key of the dropout; None: no dropout.
    attention_impl: "auto", or "reference" for the reference on every platform.

  Returns:
    Array in the dtype of `value`. Scores and softmax are float32. A query whose keys are all masked
    gives the mean of all values.
  """
  mask = None if mask is None else jnp.asarray(mask)
  rng = rng if rate > 0.0 else None
  options = Options(heads, 0.0 if rng is None else rate, causal)
  if attention_impl == "auto" and cudnn.fits(options, query, key, mask, rng):
    return cudnn.attention(options, query, key, value)
  return _attention(attention_impl, options, query, key, value, mask, rng)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(attention_impl, options, query, key, value, mask, rng):
  """Attention with a gradient rule that keeps two numbers a row and recomputes the probabilities.

  Storing f32[B, H, L, S] costs more than recomputing it.
  """
  return _forward(attention_impl, options, query, key, value, mask, rng)[0]


def _forward(attention_impl, options, query, key, value, mask, rng):
  args = (query, key, value, mask, rng)
  forms = _forms(attention_impl, options, query, key)
  out, largest, inverse = run(forms, "forward", options, *args)
  return out, (*args, out, largest, inverse)


def _backward(attention_impl, options, saved, cotangent):
  forms = _forms(attention_impl, options, *saved[:2])
  return *run(forms, "backward", options, *saved, cotangent), None, None


_attention.defvjp(_forward, _backward)


def _forms(attention_impl, options, query, key):
  """Returns (platform, form other than the reference) of the platforms that have one."""
  if attention_impl == "reference":
    return ()
  (rows, length, channels), keys, heads = query.shape, key.shape[1], options.heads
  width = channels // heads
  forms = {}
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    over_rows, over_heads = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    if rows % over_rows or heads % over_heads:
      return ()
    rows, heads = rows // over_rows, heads // over_heads
  if length * keys >= BLOCKED_FROM and query.shape[0] * options.heads > 1:
    forms["cpu"] = BLOCKED
  if length >= KERNEL_FROM and kernel_tpu.fits(
    rows, heads, length, keys, width, query.dtype.itemsize
  ):
    forms["tpu"] = kernel_tpu.TPU
  if kernel_gpu.fits(length, width):
    forms["cuda"] = kernel_gpu.GPU
  return tuple(forms.items())
