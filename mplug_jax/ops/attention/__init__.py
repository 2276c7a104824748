"""Scaled dot-product attention, heads first: the plain path, and faster forms of it chosen by platform and shape.

Shapes: B rows, H heads, L queries, S keys, Dh head width. The choice is made when a program is lowered
(`jax.lax.platform_dependent`), for the platform it is lowered for, not the one it is traced on. One `jax.export` for several
platforms at once needs "plain": JAX 0.10 lowers a Pallas kernel for all of them or none.

- CPU: a head at a time, so that its scores stay in the cache. The same arithmetic.
- TPU: the Pallas flash attention that comes with JAX, where no probabilities are dropped and no mask tells queries apart.
- GPU: cuDNN's, in half precision, without mask and dropout, when the program is traced on a machine with a GPU.
- Everything else: the plain path, three products and a softmax, which is the reference for all.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.sharding import PartitionSpec as P

from mplug_jax.ops.dropout import dropout
from mplug_jax.parallel.mesh import BATCH_AXES

MASKED = (
  -1e9
)  # added to the score of a masked key: finite, so a row without any key gives a mean, not NaN
BLOCKED_FROM = 2**16  # scores of a head from which it is worth a turn of a loop on CPU
FUSED_FROM = 256  # queries, and keys, from which a fused kernel is worth its padding
LANES = 128  # of a TPU: lengths are padded to a multiple
LARGEST_BLOCK = 640  # queries or keys of a step of the flash kernel: 577 image tokens fit one


def attention(query, key, value, mask=None, rate=0.0, rng=None, kernels="auto"):
  """Scaled dot-product attention.

  Args:
    query: f[B, H, L, Dh]. key, value: f[B, H, S, Dh].
    mask: bool, broadcastable to [B, H, L, S] and of four axes; True = may be attended to. None = all.
    rate, rng: dropout of the attention probabilities; rng None = off.
    kernels: "auto", or "plain" for the plain path everywhere.

  Returns:
    dtype[B, H, L, Dh] in the dtype of `value`. Scores and softmax are float32. A row whose keys are all masked gives
    the mean of all values.
  """
  mask, rng = None if mask is None else jnp.asarray(mask), rng if rate > 0.0 else None
  if kernels == "auto" and _cudnn_fits(query, key, mask, rng):
    swapped = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.nn.dot_product_attention(*swapped, implementation="cudnn").swapaxes(1, 2)
  return _attention(kernels, rate, query, key, value, mask, rng)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(kernels, rate, query, key, value, mask, rng):
  """Its own gradient rule keeps two numbers a row and computes the probabilities again: f32[B, H, L, S] costs more than that."""
  return _forward(kernels, rate, query, key, value, mask, rng)[0]


def _forward(kernels, rate, query, key, value, mask, rng):
  out, largest, inverse = _choose("forward", kernels, rate, query, key, value, mask, rng)
  return out, (query, key, value, mask, rng, out, largest, inverse)


def _backward(kernels, rate, saved, cotangent):
  return *_choose("backward", kernels, rate, *saved, cotangent), None, None


_attention.defvjp(_forward, _backward)


class _Form(NamedTuple):
  """One way to compute attention; both directions of a call use the same.

  forward: (rate, query, key, value, mask, rng) -> (out, largest score f32[B, H, L, 1], 1 / sum of exponentials f32[B, H, L, 1]).
  backward: (rate, query, key, value, mask, rng, out, largest, inverse, cotangent) -> gradients of query, key and value.
  """

  forward: callable
  backward: callable


def _choose(direction, kernels, rate, query, key, value, mask, rng, *saved):
  """Runs a direction of the form that suits the shapes, on each platform its own."""
  forms = {} if kernels == "plain" else _forms(query, key, mask, rng)
  calls = {
    platform: functools.partial(getattr(form, direction), rate) for platform, form in forms.items()
  }
  plain = functools.partial(getattr(_PLAIN, direction), rate)
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
    forms["cpu"] = _BLOCKED
  if (
    min(length, keys) >= FUSED_FROM
    and rng is None
    and (mask is None or mask.shape[1] == mask.shape[2] == 1)
  ):
    forms["tpu"] = _FLASH
  return forms


def _per_shard(function, *args):
  """function(*args) on every device's own rows and heads; arrays are [B or 1, H or 1, ...], or scalars."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return function(*args)

  def spec(x):
    return P(
      *(axes if size > 1 else None for size, axes in zip(x.shape[:2], (BATCH_AXES, "tensor")))
    )

  return jax.shard_map(
    function, in_specs=jax.tree.map(spec, args), out_specs=P(BATCH_AXES, "tensor"), check_vma=False
  )(*args)


# ---- the plain path; first_row numbers the first row of probabilities among all, for dropout


def masked_scores(query, key, mask):
  """f32[B, H, L, S] of `attention`, before the softmax."""
  scores = jnp.einsum(
    "bhld,bhsd->bhls",
    query * (1.0 / math.sqrt(query.shape[-1])),
    key,
    preferred_element_type=jnp.float32,
  )
  return scores if mask is None else jnp.where(mask, scores, MASKED)


def _plain_forward(rate, query, key, value, mask, rng, first_row=0):
  scores = masked_scores(query, key, mask)
  largest = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - largest)
  total = weights.sum(-1, keepdims=True)
  weights = dropout(weights, rate, rng, first_row).astype(value.dtype)
  # Dividing after the product with the values touches L x Dh numbers instead of L x S.
  out = jnp.einsum("bhls,bhsd->bhld", weights, value, preferred_element_type=jnp.float32) / total
  return out.astype(value.dtype), largest, 1.0 / total


def _plain_backward(
  rate, query, key, value, mask, rng, out, largest, inverse, cotangent, first_row=0
):
  """With P the probabilities and dP their gradient, dS = P (dP - sum P dP), and the sum is the cotangent times the output."""
  dtype, scale = value.dtype, 1.0 / math.sqrt(query.shape[-1])
  weights = jnp.exp(masked_scores(query, key, mask) - largest) * inverse
  d_value = jnp.einsum(
    "bhls,bhld->bhsd", dropout(weights, rate, rng, first_row).astype(dtype), cotangent
  )
  d_weights = jnp.einsum("bhld,bhsd->bhls", cotangent, value, preferred_element_type=jnp.float32)
  inner = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
  d_scores = weights * (dropout(d_weights, rate, rng, first_row) - inner)
  if mask is not None:
    d_scores = jnp.where(mask, d_scores, 0.0)  # of a row without any key; elsewhere it is 0 already
  d_scores = d_scores.astype(dtype)
  d_query = jnp.einsum("bhls,bhsd->bhld", d_scores, key * scale).astype(query.dtype)
  return d_query, jnp.einsum("bhls,bhld->bhsd", d_scores, query * scale), d_value


_PLAIN = _Form(_plain_forward, _plain_backward)


# ---- blocks of one head, for CPU


def _blocked(function, rate, mask, rng, *arrays):
  """A plain direction over one head after another. arrays: query, key, value and what else it takes, all [B, H, ...]."""

  def shard(mask, rng, numbers, *arrays):
    rows, heads, length = arrays[0].shape[:3]
    flat = jax.tree.map(lambda x: x.reshape((rows * heads, 1, 1) + x.shape[2:]), arrays)

    def one(inputs):
      place, number, (query, key, value, *saved) = inputs
      own = None
      if mask is not None:
        own = mask[
          place // heads if mask.shape[0] > 1 else 0, place % heads if mask.shape[1] > 1 else 0
        ][None, None]
      return function(
        rate, query, key, value, own, rng, *saved, first_row=number * jnp.uint32(length)
      )

    results = jax.lax.map(one, (jnp.arange(rows * heads), numbers.ravel(), flat))
    return jax.tree.map(lambda x: x.reshape((rows, heads) + x.shape[3:]), results)

  rows, heads = arrays[0].shape[:2]
  return _per_shard(
    shard, mask, rng, jnp.arange(rows * heads, dtype=jnp.uint32).reshape(rows, heads), *arrays
  )


def _blocked_forward(rate, query, key, value, mask, rng):
  return _blocked(_plain_forward, rate, mask, rng, query, key, value)


def _blocked_backward(rate, query, key, value, mask, rng, *saved):
  return _blocked(_plain_backward, rate, mask, rng, query, key, value, *saved)


_BLOCKED = _Form(_blocked_forward, _blocked_backward)


# ---- the flash kernel, for TPU


def _pad(x, value=0.0):
  """f[B, H, L, ...] -> f[B, H, L padded to a multiple of LANES, ...]."""
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, 0)), constant_values=value)


def _flash_inputs(query, key, value, mask):
  """-> (padded query, key, value, segment ids or None, block sizes, whether a row has any key: bool[B, 1, 1, 1] or None)."""
  rows, _, length, _ = query.shape
  keys = key.shape[2]
  if mask is None:
    some, seen = None, jnp.ones((rows, keys), bool)
  else:
    # A row without any key: equal scores for all of them give the mean that the plain path gives.
    mask = jnp.broadcast_to(mask[:, 0, 0], (rows, keys))
    some, seen = mask.any(-1)[:, None, None, None], mask | ~mask.any(-1, keepdims=True)
    query = jnp.where(some, query, 0)
  query, key, value = _pad(query), _pad(key), _pad(value)
  segments = None
  if mask is not None or keys % LANES:
    seen = jnp.pad(seen.astype(jnp.int32), ((0, 0), (0, -keys % LANES)))
    segments = flash.SegmentIds(jnp.ones((rows, query.shape[2]), jnp.int32), seen)
  of_queries, of_keys = (
    max(n for n in range(LANES, LARGEST_BLOCK + 1, LANES) if x.shape[2] % n == 0)
    for x in (query, key)
  )
  blocks = flash.BlockSizes(
    block_q=of_queries,
    block_k_major=of_keys,
    block_k=of_keys,
    block_b=1,
    block_q_major_dkv=of_queries,
    block_q_dkv=of_queries,
    block_k_major_dkv=of_keys,
    block_k_dkv=of_keys,
    block_q_dq=of_queries,
    block_k_major_dq=of_keys,
    block_k_dq=of_keys,
  )
  return query, key, value, segments, blocks, some


def _flash_forward(rate, query, key, value, mask, rng):
  """The two directions of JAX's kernel apart, which its public function does not give: both are wanted here so that what is
  kept between them is the same on every platform."""
  del rate, rng
  length, scale = query.shape[2], 1.0 / math.sqrt(query.shape[-1])

  def shard(query, key, value, mask):
    query, key, value, segments, blocks, _ = _flash_inputs(query, key, value, mask)
    out, saved = flash._flash_attention_fwd(
      query, key, value, None, segments, False, False, scale, blocks, False
    )
    total, largest = (x[:, :, :length, None] for x in saved[-2:])
    return out[:, :, :length], largest, 1.0 / total

  return _per_shard(shard, query, key, value, mask)


def _flash_backward(rate, query, key, value, mask, rng, out, largest, inverse, cotangent):
  del rate, rng
  length, keys, scale = query.shape[2], key.shape[2], 1.0 / math.sqrt(query.shape[-1])

  def shard(query, key, value, mask, out, largest, inverse, cotangent):
    query, key, value, segments, blocks, some = _flash_inputs(query, key, value, mask)
    saved = (
      query,
      key,
      value,
      None,
      segments,
      _pad(out),
      1.0 / _pad(inverse, 1.0)[..., 0],
      _pad(largest)[..., 0],
    )
    d_query, d_key, d_value, *_ = flash._flash_attention_bwd(
      False, False, scale, blocks, False, saved, _pad(cotangent)
    )
    d_query = d_query[:, :, :length]
    return (
      d_query if some is None else jnp.where(some, d_query, 0),
      d_key[:, :, :keys],
      d_value[:, :, :keys],
    )

  return _per_shard(shard, query, key, value, mask, out, largest, inverse, cotangent)


_FLASH = _Form(_flash_forward, _flash_backward)


# ---- cuDNN, for GPU


def _cudnn_fits(query, key, mask, rng):
  """Whether cuDNN takes these; it is asked for its version at tracing, so that there must be a GPU then."""
  return (
    jax.default_backend() == "gpu"
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and mask is None
    and rng is None
    and query.shape[-1] % 8 == 0
    and query.shape[-1] <= 128
    and min(query.shape[2], key.shape[2]) >= FUSED_FROM
  )
