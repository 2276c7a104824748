"""Attention on GPU: Pallas kernels, lowered by Triton, with masks and dropout.

A program of the forward kernel has a block of queries of one head and goes over blocks of keys with
a running softmax (Dao 2023, FlashAttention-2). Two kernels compute the gradients: of key and value
by blocks of keys, of the query by blocks of queries. Dropout draws the bits of
ops.dropout.random_bits.

The kernels equal the reference in Pallas's interpreter and are lowered for CUDA in the tests; no
GPU has run them.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mplug_jax.ops.attention.common import (
  MASKED,
  Form,
  Options,
  backward_per_shard,
  forward_per_shard,
  kernel_scalars,
)
from mplug_jax.ops.dropout import bits_at

_BLOCK = 64  # queries and keys of a block
_WIDTHS = (16, 32, 64, 128)  # of a head; the units of a GPU multiply blocks of powers of two


def fits(length: int, width: int) -> bool:
  """Whether the kernels can compute attention of so many queries and such a head width."""
  return width in _WIDTHS and length >= 16


class _Kernel(NamedTuple):
  """Options, and sizes of a device's arrays.

  Attributes:
    options: heads are those of the whole array; others are of the device.
    length: number of queries.
    keys: number of keys.
    width: head width.
    dropped: whether there is dropout.
  """

  options: Options
  length: int
  keys: int
  width: int
  dropped: bool

  def read(self, array: Any, count: int, block: Any = None) -> Any:
    """Returns rows of an array, with 0 beyond the last one.

    Args:
      array: reference to the block of the program, or to all rows.
      count: number of rows of the array.
      block: index of the block to read, or None for that of the program.
    """
    first = (pl.program_id(2) if block is None else block) * _BLOCK
    inside = first + jnp.arange(_BLOCK) < count
    rows = slice(None) if block is None else pl.ds(first, _BLOCK)
    if len(array.shape) == 1:
      return triton.load(array.at[rows], mask=inside, other=0)
    return triton.load(array.at[rows, :], mask=inside[:, None], other=0)

  def write(self, array: Any, x: Any, count: int) -> None:
    """Writes the block of the program to its array of `count` rows."""
    inside = pl.program_id(2) * _BLOCK + jnp.arange(_BLOCK) < count
    triton.store(array, x.astype(array.dtype), mask=inside[:, None] if x.ndim == 2 else inside)

  def scores(self, query: Any, key: Any, mask: Any, queries: Any, keys: Any) -> tuple[Any, Any]:
    """Returns (scores f32[queries, keys], which keys a query attends to).

    Args:
      query: block of queries.
      key: block of keys.
      mask: reference to the mask of keys, or None.
      queries: index of the block of queries.
      keys: index of the block of keys.
    """
    scores = _product(query * (1.0 / math.sqrt(self.width)), key, trans_b=True)
    columns = keys * _BLOCK + jnp.arange(_BLOCK)[None]
    inside = columns < self.keys
    allowed = jnp.broadcast_to(inside, scores.shape)
    if mask is not None:
      allowed &= self.read(mask, self.keys, keys)[None] != 0
    if self.options.causal:
      allowed &= queries * _BLOCK + jnp.arange(_BLOCK)[:, None] >= columns
    scores = jnp.where(allowed, scores, MASKED)
    return jnp.where(inside, scores, -jnp.inf), allowed

  def head(self, scalars: Any) -> tuple[Any, Any, Any]:
    """Returns (both seeds of dropout, number of the program's head), not known inside of loops."""
    number = scalars[2] + pl.program_id(0) * self.options.heads + pl.program_id(1)
    return scalars[0].astype(jnp.uint32), scalars[1].astype(jnp.uint32), number

  def drop(self, x: Any, head: Any, queries: Any, keys: Any) -> Any:
    """Returns a block of probabilities, or of their gradients, after dropout."""
    if not self.dropped:
      return x
    first, second, number = head
    rows = number * self.length + queries * _BLOCK + jnp.arange(_BLOCK)[:, None]
    columns = keys * _BLOCK + jnp.arange(_BLOCK)[None]
    bits = bits_at(first, second, rows.astype(jnp.uint32), columns.astype(jnp.uint32))
    keep = bits >= jnp.uint32(int(self.options.rate * 2**32))
    return jnp.where(keep, x * (1.0 / (1.0 - self.options.rate)), 0.0)


def _forward_kernel(kernel: _Kernel, scalars, query, key, value, *rest):
  """Computes a block of queries; `rest` is the mask, if any, output, largest and 1 / sum."""
  *mask, out, largest, inverse = rest
  block, head = pl.program_id(2), kernel.head(scalars)
  q = kernel.read(query, kernel.length)

  def add(keys, carry):
    total, peak, sums = carry
    k, v = (kernel.read(x, kernel.keys, keys) for x in (key, value))
    scores, _ = kernel.scores(q, k, mask[0] if mask else None, block, keys)
    new = jnp.maximum(peak, scores.max(-1))
    weights = jnp.exp(scores - new[:, None])
    shrink = jnp.exp(peak - new)
    dropped = kernel.drop(weights, head, block, keys).astype(v.dtype)
    total = total * shrink[:, None] + _product(dropped, v)
    return total, new, sums * shrink + weights.sum(-1)

  start = (
    jnp.zeros((_BLOCK, kernel.width), jnp.float32),
    jnp.full((_BLOCK,), -jnp.inf, jnp.float32),
    jnp.zeros((_BLOCK,), jnp.float32),
  )
  total, peak, sums = jax.lax.fori_loop(0, pl.cdiv(kernel.keys, _BLOCK), add, start)
  kernel.write(out, total / sums[:, None], kernel.length)
  kernel.write(largest, peak, kernel.length)
  kernel.write(inverse, 1.0 / sums, kernel.length)


def _score_gradient(kernel, head, mask, arrays, queries, keys):
  """Returns (dropped probabilities, gradient of the scores) of a block, in the dtype of the keys.

  Args:
    kernel: see _Kernel.
    head: see _Kernel.head.
    mask: the reference to the mask of keys, if any.
    arrays: blocks of query, key, value, cotangent, largest, 1 / sum, cotangent times output.
    queries: index of the block of queries.
    keys: index of the block of keys.
  """
  q, k, v, d_out, largest, inverse, inner = arrays
  scores, allowed = kernel.scores(q, k, mask[0] if mask else None, queries, keys)
  weights = jnp.exp(scores - largest[:, None]) * inverse[:, None]
  d_weights = kernel.drop(_product(d_out, v, trans_b=True), head, queries, keys)
  d_scores = jnp.where(allowed, weights * (d_weights - inner[:, None]), 0.0)
  dropped = kernel.drop(weights, head, queries, keys)
  return dropped.astype(k.dtype), d_scores.astype(k.dtype)


def _keys_kernel(kernel: _Kernel, scalars, query, key, value, cotangent, *rest):
  """Computes the gradients of a block of keys and values."""
  largest, inverse, inner, *mask, d_key, d_value = rest
  block, head = pl.program_id(2), kernel.head(scalars)
  k, v = (kernel.read(x, kernel.keys) for x in (key, value))

  def add(queries, carry):
    of_key, of_value = carry
    q, d_out, *numbers = (
      kernel.read(x, kernel.length, queries) for x in (query, cotangent, largest, inverse, inner)
    )
    arrays = (q, k, v, d_out, *numbers)
    dropped, d_scores = _score_gradient(kernel, head, mask, arrays, queries, block)
    of_value += _product(dropped, d_out, trans_a=True)
    of_key += _product(d_scores, q * (1.0 / math.sqrt(kernel.width)), trans_a=True)
    return of_key, of_value

  zeros = jnp.zeros((_BLOCK, kernel.width), jnp.float32)
  of_key, of_value = jax.lax.fori_loop(0, pl.cdiv(kernel.length, _BLOCK), add, (zeros, zeros))
  kernel.write(d_key, of_key, kernel.keys)
  kernel.write(d_value, of_value, kernel.keys)


def _query_kernel(kernel: _Kernel, scalars, query, key, value, cotangent, *rest):
  """Computes the gradient of a block of queries."""
  largest, inverse, inner, *mask, d_query = rest
  block, head = pl.program_id(2), kernel.head(scalars)
  q, d_out, *numbers = [
    kernel.read(x, kernel.length) for x in (query, cotangent, largest, inverse, inner)
  ]

  def add(keys, of_query):
    k, v = (kernel.read(x, kernel.keys, keys) for x in (key, value))
    arrays = (q, k, v, d_out, *numbers)
    _, d_scores = _score_gradient(kernel, head, mask, arrays, block, keys)
    return of_query + _product(d_scores, k * (1.0 / math.sqrt(kernel.width)))

  zeros = jnp.zeros((_BLOCK, kernel.width), jnp.float32)
  of_query = jax.lax.fori_loop(0, pl.cdiv(kernel.keys, _BLOCK), add, zeros)
  kernel.write(d_query, of_query, kernel.length)


def _product(left: Any, right: Any, trans_a: bool = False, trans_b: bool = False) -> Any:
  """Returns the product of two blocks in float32."""
  return triton.dot(left, right, trans_a, trans_b).astype(jnp.float32)


class _Specs(NamedTuple):
  """Block specs by kind of array.

  Attributes:
    block: [B, L or S, H * Dh], the block of the grid.
    all: function of their number: likewise, all rows.
    numbers: [B, H, L], the block of the grid.
    all_numbers: likewise, all rows.
    mask: [B, S].
    scalars: [4].
  """

  block: pl.BlockSpec
  all: Any
  numbers: pl.BlockSpec
  all_numbers: pl.BlockSpec
  mask: pl.BlockSpec
  scalars: pl.BlockSpec


def _specs(kernel: _Kernel) -> _Specs:
  """Returns the specs of a kernel; whole arrays are padded to full blocks."""

  def rows(count):
    padded = pl.cdiv(count, _BLOCK) * _BLOCK
    return pl.BlockSpec((None, padded, kernel.width), lambda row, head, block: (row, 0, head))

  return _Specs(
    pl.BlockSpec((None, _BLOCK, kernel.width), lambda row, head, block: (row, block, head)),
    rows,
    pl.BlockSpec((None, None, _BLOCK), lambda row, head, block: (row, head, block)),
    pl.BlockSpec(
      (None, None, pl.cdiv(kernel.length, _BLOCK) * _BLOCK),
      lambda row, head, block: (row, head, 0),
    ),
    pl.BlockSpec((None, pl.cdiv(kernel.keys, _BLOCK) * _BLOCK), lambda row, head, block: (row, 0)),
    pl.BlockSpec((4,), lambda row, head, block: (0,)),
  )


def _prepare(options, query, key, mask, rng, numbers):
  """Returns (_Kernel, scalars, the mask as a tuple of at most one array) of a device."""
  heads = numbers.shape[1]
  width = query.shape[2] // heads
  kernel = _Kernel(options, query.shape[1], key.shape[1], width, rng is not None)
  rows = (query.shape[0], key.shape[1])
  masks = () if mask is None else (jnp.broadcast_to(mask, rows).astype(jnp.int32),)
  return kernel, kernel_scalars(rng, numbers), masks


def _call(function, kernel, interpret, grid, in_specs, outputs, *arrays):
  """Runs a kernel; `outputs` are (shape and dtype, spec)."""
  return pl.pallas_call(
    functools.partial(function, kernel),
    out_shape=[shape for shape, _ in outputs],
    grid=grid,
    in_specs=in_specs,
    out_specs=[spec for _, spec in outputs],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name=f"attention{function.__name__}",
  )(*arrays)


def _forward_shard(options, interpret, mask, rng, numbers, query, key, value):
  kernel, scalars, masks = _prepare(options, query, key, mask, rng, numbers)
  specs = _specs(kernel)
  whole = specs.all(kernel.keys)
  rows, heads = numbers.shape
  statistics = jax.ShapeDtypeStruct((rows, heads, kernel.length), jnp.float32)
  out, largest, inverse = _call(
    _forward_kernel,
    kernel,
    interpret,
    (rows, heads, pl.cdiv(kernel.length, _BLOCK)),
    [specs.scalars, specs.block, whole, whole, *[specs.mask] * len(masks)],
    [
      (jax.ShapeDtypeStruct(query.shape, query.dtype), specs.block),
      (statistics, specs.numbers),
      (statistics, specs.numbers),
    ],
    *(scalars, query, key, value, *masks),
  )
  return out, largest[..., None], inverse[..., None]


def _backward_shard(
  options, interpret, mask, rng, numbers, query, key, value, out, cotangent, largest, inverse
):
  kernel, scalars, masks = _prepare(options, query, key, mask, rng, numbers)
  specs = _specs(kernel)
  rows, heads = numbers.shape
  products = cotangent.astype(jnp.float32) * out.astype(jnp.float32)
  inner = products.reshape(rows, kernel.length, heads, kernel.width).sum(-1).swapaxes(1, 2)
  arrays = (scalars, query, key, value, cotangent, largest[..., 0], inverse[..., 0], inner, *masks)
  masked = [specs.mask] * len(masks)
  queries, keys = specs.all(kernel.length), specs.all(kernel.keys)

  def like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype), specs.block

  d_key, d_value = _call(
    _keys_kernel,
    kernel,
    interpret,
    (rows, heads, pl.cdiv(kernel.keys, _BLOCK)),
    [specs.scalars, queries, specs.block, specs.block, queries, *[specs.all_numbers] * 3, *masked],
    [like(key), like(value)],
    *arrays,
  )
  (d_query,) = _call(
    _query_kernel,
    kernel,
    interpret,
    (rows, heads, pl.cdiv(kernel.length, _BLOCK)),
    [specs.scalars, specs.block, keys, keys, specs.block, *[specs.numbers] * 3, *masked],
    [like(query)],
    *arrays,
  )
  return d_query, d_key, d_value


def forward(options: Options, *args: Any, interpret: bool = False) -> Any:
  """Returns what Form.forward returns."""
  shard = functools.partial(_forward_shard, options, interpret)
  return forward_per_shard(shard, options.heads, *args)


def backward(options: Options, *args: Any, interpret: bool = False) -> Any:
  """Returns what Form.backward returns."""
  shard = functools.partial(_backward_shard, options, interpret)
  return backward_per_shard(shard, options.heads, *args)


GPU = Form(forward, backward)
