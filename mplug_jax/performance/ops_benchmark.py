"""Gain of every hand-written array operation over its reference, see mplug_jax/ops."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mplug_jax.ops import activations, table

# Base preset at 384 pixels.
_TOKENS = 577
_WIDTH = 768
_HEADS = 12
_RATE = 0.1


def _cases(batch: int) -> Iterator[tuple[str, Callable[[table.Ops], Callable[..., Any]], Any]]:
  """Yields (name, function (operations) -> differentiable function of the arrays, arrays)."""
  key = jax.random.key(0)

  def draw(*shape):
    return jax.random.normal(key, shape)

  tokens = draw(batch, _TOKENS, _WIDTH)
  wide = draw(batch, _TOKENS, 4 * _WIDTH)
  vector = draw(_WIDTH)
  three = (tokens,) * 3
  yield (
    "linear layer",
    lambda ops: functools.partial(ops.linear, None),
    (tokens, draw(_WIDTH, 4 * _WIDTH), draw(4 * _WIDTH)),
  )
  yield (
    "GELU and linear layer",
    lambda ops: functools.partial(ops.linear, activations.gelu),
    (wide, draw(4 * _WIDTH, _WIDTH), vector),
  )
  yield "layer norm", lambda ops: lambda *x: ops.normalize(*x, 1e-5), (tokens, vector, vector)
  yield "attention", lambda ops: lambda *x: ops.attention(*x, _HEADS), three
  yield (
    "attention with dropout",
    lambda ops: lambda *x: ops.attention(*x, _HEADS, rate=_RATE, rng=key),
    three,
  )
  yield "dropout", lambda ops: lambda x: ops.dropout(x, _RATE, key), (tokens,)


def _compile(function: Callable[..., Any], arrays: tuple[jax.Array, ...]) -> Any:
  """Returns the compiled value and gradients of a sum of squares of the function."""

  def loss(*arrays):
    return jnp.square(function(*arrays)).sum()

  gradients = jax.value_and_grad(loss, tuple(range(len(arrays))))
  return jax.jit(gradients).lower(*arrays).compile()


def _fastest(programs: dict[str, Any], arrays: tuple[Any, ...], repeats: int) -> dict[str, float]:
  """Returns the least seconds of each program; the programs run in turns."""
  seconds = dict.fromkeys(programs, float("inf"))
  for _ in range(repeats):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(*arrays))
      seconds[name] = min(seconds[name], time.perf_counter() - start)
  return seconds


def _megabytes(program: Any) -> float:
  """Returns the temporary memory of a compiled program."""
  return program.memory_analysis().temp_size_in_bytes / 2**20


def measure(batch: int, repeats: int) -> list[dict[str, Any]]:
  """Measures value and gradients of every operation and of its reference, side by side.

  Args:
    batch: images.
    repeats: runs of each program, of which the fastest counts.

  Returns:
    One row per operation: "name", "milliseconds", "reference_milliseconds", "megabytes" of
    temporary memory and "reference_megabytes".
  """
  both = {"auto": table.get("auto"), "reference": table.get("reference")}
  rows = []
  for name, make, arrays in _cases(batch):
    programs = {key: _compile(make(ops), arrays) for key, ops in both.items()}
    rows.append(_row(name, programs, arrays, repeats))
  shape = (_WIDTH, 4 * _WIDTH)
  init = {key: jax.jit(lambda k, ops=ops: ops.normal(0.02)(k, shape)) for key, ops in both.items()}
  key = jax.random.key(0)
  programs = {name: function.lower(key).compile() for name, function in init.items()}
  return [*rows, _row("normal initializer", programs, (key,), repeats)]


def _row(
  name: str, programs: dict[str, Any], arrays: tuple[Any, ...], repeats: int
) -> dict[str, Any]:
  """Returns a row of `measure`."""
  seconds = _fastest(programs, arrays, repeats)
  return {
    "name": name,
    "milliseconds": round(1e3 * seconds["auto"], 2),
    "reference_milliseconds": round(1e3 * seconds["reference"], 2),
    "megabytes": round(_megabytes(programs["auto"]), 1),
    "reference_megabytes": round(_megabytes(programs["reference"]), 1),
  }


def report(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Formats results of `measure` as lines of text.

  Args:
    rows: results of `measure`.
  """
  lines = [f"{'operation':24}{'ms':>9}{'reference':>11}{'MiB':>9}{'reference':>11}"]
  return lines + [
    f"{row['name']:24}{row['milliseconds']:9.2f}{row['reference_milliseconds']:11.2f}"
    f"{row['megabytes']:9.1f}{row['reference_megabytes']:11.1f}"
    for row in rows
  ]
