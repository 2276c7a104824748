"""Attention on TPU: a Pallas kernel for each direction that keeps the probabilities on the chip.

Queries, keys and values are read as [B, L, H * Dh], as the projections write them: a block has the
channels of the few heads that fill the 128 lanes. A step of the grid has all keys of its rows, so
that a softmax is one pass, and the backward kernel computes it again from query and key: neither
statistics nor the output are kept for it. Dropout draws the bits of ops.dropout.random_bits.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mplug_jax.ops.attention.common import (
  MASKED,
  Form,
  Options,
  backward_per_shard,
  forward_per_shard,
  kernel_scalars,
)
from mplug_jax.ops.dropout import bits_at
from mplug_jax.parallel import mesh

LANES = 128
_SUBLANES = 16  # rows of a tile of half precision
# VMEM of a core in MiB by kind of device; the smallest for kinds that are not listed.
_VMEM = {"TPU v5 lite": 128, "TPU v5": 64, "TPU v5p": 64, "TPU v6 lite": 128, "TPU7x": 64}
_SMALLEST_VMEM = 16
_LARGEST_BUDGET = 32  # MiB; the rest of VMEM is XLA's, which keeps arrays there between programs
_SCORES = 8  # arrays f32[queries, keys] of a head that a step has at once, estimated from above
_ROW_SCORES = 2**18  # scores of a head up to which a step takes several rows
_LARGEST_ROWS = 8


class Blocks(NamedTuple):
  """Block sizes of a step of the grid.

  Attributes:
    rows: number of rows of the batch.
    heads: number of heads.
    queries: number of queries; the last step may have fewer.
    vmem: bytes that the kernel may use.
  """

  rows: int
  heads: int
  queries: int
  vmem: int


def _budget() -> int:
  """Returns the bytes of VMEM for a kernel on the chip that the program is compiled for."""
  _, kind = mesh.target()
  mebibytes = min(_VMEM.get(kind, _SMALLEST_VMEM) * 3 // 4, _LARGEST_BUDGET)
  return mebibytes * 2**20


def choose_blocks(
  rows: int, heads: int, length: int, keys: int, width: int, itemsize: int, budget: int
) -> Blocks | None:
  """Returns the blocks of both kernels, or None if no block fits.

  Args:
    rows: rows of the batch.
    heads: number of heads.
    length: number of queries.
    keys: number of keys.
    width: head width.
    itemsize: bytes of an element.
    budget: bytes of VMEM.
  """
  at_once = next((n for n in range(1, heads) if not heads % n and not n * width % LANES), heads)
  lanes = _up(at_once * width, LANES)

  def needed(rows, queries):
    arrays = 3 * _up(queries, _SUBLANES) + 4 * _up(keys, _SUBLANES)  # of the backward kernel
    kept = 2 * rows * arrays * lanes * itemsize  # of this step and of the next one
    sums = 2 * rows * _up(keys, 8) * lanes * 4
    return kept + sums + _SCORES * _up(queries, 8) * _up(keys, LANES) * 4

  if needed(1, length) <= budget:
    several = [
      n
      for n in range(1, min(rows, _LARGEST_ROWS) + 1)
      if not rows % n and n * length * keys <= _ROW_SCORES and needed(n, length) <= budget
    ]
    return Blocks(max(several, default=1), at_once, length, budget)
  for queries in (1024, 512, 256, 128):
    if queries < length and needed(1, queries) <= budget:
      return Blocks(1, at_once, queries, budget)
  return None


def fits(rows: int, heads: int, length: int, keys: int, width: int, itemsize: int) -> bool:
  """Whether the kernels can compute attention of a device; arguments as of `choose_blocks`."""
  return choose_blocks(rows, heads, length, keys, width, itemsize, _budget()) is not None


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


class _Kernel(NamedTuple):
  """Options, sizes of a device's arrays, and blocks.

  Attributes:
    options: heads are those of the whole array; others are of the device.
    length: number of queries.
    keys: number of keys.
    width: head width.
    dropped: whether there is dropout.
    blocks: see Blocks.
  """

  options: Options
  length: int
  keys: int
  width: int
  dropped: bool
  blocks: Blocks

  @property
  def partial(self) -> bool:
    """Whether the last block of queries is not full."""
    return self.length % self.blocks.queries > 0


class _Step:
  """A step of the grid: what both kernels compute in it."""

  def __init__(self, kernel: _Kernel, scalars: Any, mask: Any):
    """Reads the position in the grid, which is not known inside of loops.

    Args:
      kernel: see _Kernel.
      scalars: reference to i32[4], see kernel_scalars.
      mask: reference to i32[rows, 1, keys], or None.
    """
    self._kernel = kernel
    self._mask = mask
    self._scalars = tuple(scalars[i] for i in range(3))
    blocks = kernel.blocks
    self._first_row, self._first_head, self._first_query = (
      pl.program_id(i) * n for i, n in enumerate((blocks.rows, blocks.heads, blocks.queries))
    )

  def queries(self) -> Any:
    """Returns the indices of the queries, i32[queries, 1]."""
    numbers = jax.lax.broadcasted_iota(jnp.int32, (self._kernel.blocks.queries, 1), 0)
    return numbers + self._first_query

  def keys(self) -> Any:
    """Returns the indices of the keys, i32[1, keys]."""
    return jax.lax.broadcasted_iota(jnp.int32, (1, self._kernel.keys), 1)

  def allowed(self, row: Any) -> Any:
    """Returns which keys a row's queries attend to, broadcastable to [queries, keys], or None."""
    allowed = None if self._mask is None else self._mask[row] != 0
    if self._kernel.options.causal:
      earlier = self.queries() >= self.keys()
      allowed = earlier if allowed is None else earlier & allowed
    return allowed

  def keep(self, row: Any, head: int) -> Any:
    """Returns which probabilities of a head dropout keeps, bool[queries, keys], or None.

    The bits are those of ops.dropout.random_bits for the whole array.
    """
    if not self._kernel.dropped:
      return None
    first, second, number = self._scalars
    number += (self._first_row + row) * self._kernel.options.heads + self._first_head + head
    index = number * self._kernel.length + self.queries()
    bits = bits_at(*(x.astype(jnp.uint32) for x in (first, second, index, self.keys())))
    return bits >= jnp.uint32(int(self._kernel.options.rate * 2**32))

  def drop(self, x: Any, keep: Any) -> Any:
    """Returns `x` after dropout."""
    return (
      x if keep is None else jnp.where(keep, x * (1.0 / (1.0 - self._kernel.options.rate)), 0.0)
    )

  def heads(self) -> list[tuple[int, slice]]:
    """Returns (head, its lanes) of the heads."""
    width = self._kernel.width
    return [(i, slice(i * width, (i + 1) * width)) for i in range(self._kernel.blocks.heads)]

  def exponentials(self, query: Any, key: Any, allowed: Any) -> Any:
    """Returns (exp(score - largest) f32[queries, keys], their sums f32[queries, 1])."""
    scores = _product(query * (1.0 / math.sqrt(self._kernel.width)), key, 1, 1)
    if allowed is not None:
      scores = jnp.where(allowed, scores, MASKED)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)

  def for_each_row(self, function: Any) -> None:
    """Calls function(row) for each row."""
    if self._kernel.blocks.rows == 1:
      function(0)
    else:
      jax.lax.fori_loop(0, self._kernel.blocks.rows, lambda row, _: function(row), None)


def _product(left: Any, right: Any, left_axis: int, right_axis: int) -> Any:
  """Returns the product of two matrices over one axis of each, in float32."""
  dimensions = (((left_axis,), (right_axis,)), ((), ()))
  return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _forward_kernel(kernel: _Kernel, scalars, query, key, value, *rest):
  """Computes a step from references to blocks; `rest` is the mask, if any, and the output."""
  *mask, out = rest
  step = _Step(kernel, scalars, *(mask or [None]))

  def compute(row):
    allowed = step.allowed(row)
    for head, lanes in step.heads():
      weights, total = step.exponentials(query[row, :, lanes], key[row, :, lanes], allowed)
      weights = step.drop(weights, step.keep(row, head)).astype(value.dtype)
      out[row, :, lanes] = (_product(weights, value[row, :, lanes], 1, 0) / total).astype(out.dtype)

  step.for_each_row(compute)


def _backward_kernel(kernel: _Kernel, scalars, query, key, value, cotangent, *rest):
  """Computes a step of the gradients, see ops.attention.reference.heads_backward.

  The gradients of key and value are summed in float32 over the blocks of queries.
  """
  *mask, d_query, d_key, d_value, key_sum, value_sum = rest
  step = _Step(kernel, scalars, *(mask or [None]))
  block, last = pl.program_id(2), pl.num_programs(2) - 1
  dtype = value.dtype
  scale = 1.0 / math.sqrt(kernel.width)

  def read(array, row, lanes):
    x = array[row, :, lanes]
    # Beyond the last query a block holds anything, and a product with 0 would keep a NaN.
    return jnp.where(step.queries() < kernel.length, x, 0) if kernel.partial else x

  def add(total, result, gradient, row, lanes):
    if kernel.blocks.queries >= kernel.length:
      result[row, :, lanes] = gradient.astype(result.dtype)
      return
    total[row, :, lanes] = jnp.where(block == 0, gradient, total[row, :, lanes] + gradient)

    @pl.when(block == last)
    def _():
      result[row, :, lanes] = total[row, :, lanes].astype(result.dtype)

  def compute(row):
    allowed = step.allowed(row)
    for head, lanes in step.heads():
      q, d_out = read(query, row, lanes), read(cotangent, row, lanes)
      k, v = key[row, :, lanes], value[row, :, lanes]
      weights, total = step.exponentials(q, k, allowed)
      weights = weights / total
      keep = step.keep(row, head)
      d_v = _product(step.drop(weights, keep).astype(dtype), d_out, 0, 0)
      add(value_sum, d_value, d_v, row, lanes)
      d_weights = step.drop(_product(d_out, v, 1, 1), keep)
      d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
      if allowed is not None:
        d_scores = jnp.where(allowed, d_scores, 0.0)
      d_scores = d_scores.astype(dtype)
      d_query[row, :, lanes] = _product(d_scores, k * scale, 1, 0).astype(d_query.dtype)
      add(key_sum, d_key, _product(d_scores, q * scale, 0, 0), row, lanes)

  step.for_each_row(compute)


def _call(
  function: Any, options: Options, interpret: bool, mask: Any, rng: Any, numbers: Any, *arrays: Any
) -> Any:
  """Runs a kernel on a device's arrays.

  Args:
    function: `_forward_kernel` or `_backward_kernel`.
    options: see Options.
    interpret: run Pallas's interpreter, on any platform.
    mask: bool[B or 1, S] or None.
    rng: random key of the dropout, or None.
    numbers: see `head_numbers`.
    *arrays: query, key, value and the cotangent of the output for the backward kernel.
  """
  backward = function is _backward_kernel
  query, key = arrays[:2]
  (rows, length, channels), keys, heads = query.shape, key.shape[1], numbers.shape[1]
  width = channels // heads
  blocks = choose_blocks(rows, heads, length, keys, width, query.dtype.itemsize, _budget())
  assert blocks is not None, "ops.attention asks `fits` first"
  kernel = _Kernel(options, length, keys, width, rng is not None, blocks)
  lanes = blocks.heads * width

  def of_queries(row, head, block, _):
    return row, block, head

  def of_keys(row, head, block, _):
    return row, 0, head

  queries = pl.BlockSpec((blocks.rows, blocks.queries, lanes), of_queries)
  all_keys = pl.BlockSpec((blocks.rows, keys, lanes), of_keys)
  specs = [queries, all_keys, all_keys, queries][: len(arrays)]
  if mask is not None:
    arrays += (jnp.broadcast_to(mask[:, None], (rows, 1, keys)).astype(jnp.int32),)
    specs.append(pl.BlockSpec((blocks.rows, 1, keys), lambda row, head, block, _: (row, 0, 0)))
  outputs = [(query, queries)] + [(key, all_keys), (arrays[2], all_keys)] * backward
  products = 5 if backward else 2
  scores = rows * heads * length * keys
  return pl.pallas_call(
    functools.partial(function, kernel),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(rows // blocks.rows, heads // blocks.heads, pl.cdiv(length, blocks.queries)),
      in_specs=specs,
      out_specs=[spec for _, spec in outputs],
      scratch_shapes=[pltpu.VMEM((blocks.rows, keys, lanes), jnp.float32)] * 2 * backward,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * scores * width,
      transcendentals=scores,
      bytes_accessed=sum(x.nbytes for x in arrays) + sum(x.nbytes for x, _ in outputs),
    ),
    interpret=interpret,
    name=function.__name__.strip("_"),
  )(kernel_scalars(rng, numbers), *arrays)


def forward(options: Options, *args: Any, interpret: bool = False) -> Any:
  """Returns what Form.forward returns; no backward kernel reads the statistics, which are 0."""

  def shard(mask, rng, numbers, query, key, value):
    (out,) = _call(_forward_kernel, options, interpret, mask, rng, numbers, query, key, value)
    unused = jnp.zeros((*numbers.shape, query.shape[1], 1), jnp.float32)
    return out, unused, unused

  return forward_per_shard(shard, options.heads, *args)


def backward(options: Options, *args: Any, interpret: bool = False) -> Any:
  """Returns what Form.backward returns."""

  def shard(mask, rng, numbers, query, key, value, out, cotangent, *statistics):
    del out, statistics
    arrays = (query, key, value, cotangent)
    return tuple(_call(_backward_kernel, options, interpret, mask, rng, numbers, *arrays))

  return backward_per_shard(shard, options.heads, *args)


TPU = Form(forward, backward)
