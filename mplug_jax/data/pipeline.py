"""Batches of NumPy arrays from a random-access source, made by Grain.

The module knows no task and no device. A transform turns a record of the source into an example, a
dict of arrays whose shapes and dtypes are the same for every record; see types.py.

Training order: record numbers -> shuffle (anew every epoch; as a whole, or block by block) ->
repeat -> transform with a random generator keyed by (seed, position in the global order) -> rows
of this process -> batch. The step therefore determines the position in the data: batch n is a pure
function of (seed, n), whatever the number of processes, worker processes or threads, and resuming
is slicing.
"""

import functools
import sys
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np
from absl import flags

from mplug_jax.data.types import Example, Source, Transform

_BLOCKS = 16  # blocks that are shuffled together


class Batches(Protocol):
  """Iterator over batches, {key: array[b, ...]}."""

  def __iter__(self) -> Iterator[Example]:
    """Returns itself."""
    ...

  def __next__(self) -> Example:
    """Returns the next batch."""
    ...

  def close(self) -> None:
    """Ends the threads and worker processes."""
    ...


class _BlockShuffle(grain.MapDataset):
  """Endless shuffle that keeps consecutive records near each other.

  Every epoch has all records once, and record i is a pure function of (seed, i). Blocks of `block`
  consecutive records come in a random order, and the records of each _BLOCKS blocks are shuffled
  among themselves. The positions where blocks begin change with the epoch.
  """

  def __init__(self, parent, block: int, seed: int):
    super().__init__(parent)
    self._block = block
    self._seed = seed

  def __len__(self):
    return sys.maxsize

  def __getitem__(self, index):
    count = len(self._parent)
    block = self._block
    epoch, position = divmod(index, count)
    window, inside = divmod(position, block * _BLOCKS)
    start = window * block * _BLOCKS
    position = start + int(
      _permutation(min(block * _BLOCKS, count - start), self._seed, epoch, 1 + window)[inside]
    )
    number, inside = divmod(position, block)
    if number < count // block:  # an incomplete block stays last
      position = int(_permutation(count // block, self._seed, epoch, 0)[number]) * block + inside
    return self._parent[(position + _offset(count, self._seed, epoch)) % count]


@functools.lru_cache(8)
def _permutation(size, *key):
  """Returns the numbers below `size` in an order that depends on the key alone, i64[size]."""
  return np.random.default_rng(key).permutation(size)


@functools.lru_cache(8)
def _offset(size, *key):
  """Returns a number below `size` that depends on the key alone."""
  return int(np.random.default_rng(key).integers(size))


class _ProcessRows(grain.MapDataset):
  """Rows [p b, (p + 1) b) of every global batch of P b rows, for process p of P."""

  def __init__(self, parent, rows: int, process_index: int, process_count: int):
    super().__init__(parent)
    self._rows = rows
    self._offset = process_index * rows
    self._batch_size = rows * process_count

  def __len__(self):
    return len(self._parent) // self._batch_size * self._rows

  def __getitem__(self, index):
    step, row = divmod(index, self._rows)
    return self._parent[step * self._batch_size + self._offset + row]


class _Example:
  """Reads one record and transforms it; `count` and beyond are padding rows of zeros."""

  def __init__(self, source, transform, count: int):
    self._source = source
    self._transform = transform
    self._count = count
    self._padding = None

  def __call__(self, index: int, rng: np.random.Generator | None = None) -> dict:
    if index >= self._count:
      if self._padding is None:
        self._padding = {key: np.zeros_like(value) for key, value in self._read(0, None).items()}
      return self._padding
    return self._read(index, rng)

  def _read(self, index, rng):
    try:
      example = self._transform(index, self._source[index], rng)
    except Exception as error:
      # ValueError and OSError carry a sentence; of others (KeyError) the type says more.
      reason = error if isinstance(error, (ValueError, OSError)) else repr(error)
      raise ValueError(f"Record {index} of the data cannot be used: {reason}") from error
    return {**example, "mask": np.True_}


def train_batches(
  source: Source,
  transform: Transform,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  start_step: int = 0,
  workers: int = 0,
  threads: int = 2,
  buffer: int = 4,
  block: int = 0,
) -> Batches:
  """Returns endless shuffled batches.

  Each has the b = batch_size / process_count rows of this process.

  Args:
    source: records; may hold fewer than batch_size of them.
    transform: turns a record into an example; gets a new generator for every row.
    batch_size: rows of the global batch, over all processes.
    seed: at least 0; order and random draws depend on it and the step alone.
    process_index: this process, 0 <= process_index < process_count.
    process_count: number of processes that share a global batch.
    start_step: number of batches already consumed; costs nothing.
    workers: Grain worker processes; 0 = threads of this process.
    threads: threads that make batches when workers is 0; 0 = no thread, batches are made on demand.
    buffer: batches made ahead.
    block: 0: all records are shuffled. Otherwise blocks of this many consecutive records, and the
      records of 16 blocks among themselves: less random, but consecutive records, as those of a
      shard, are read at about the same time.

  Returns:
    Iterator over {key: array[b, ...]}: the keys of the transform and mask bool[b], all True.

  Raises:
    ValueError: for an empty source or impossible sizes; from the iterator, when a record cannot
      be read or transformed (names the record).
  """
  _check(source, batch_size, process_index, process_count)
  if start_step < 0:
    raise ValueError(f"start_step must be at least 0, got {start_step}.")
  if block < 0:
    raise ValueError(f"block must be at least 0, got {block}.")
  rows = batch_size // process_count
  dataset = grain.MapDataset.range(len(source)).seed(seed)
  dataset = _BlockShuffle(dataset, block, seed) if block else dataset.shuffle().repeat()
  dataset = dataset.random_map(_Example(source, transform, len(source)))
  dataset = _ProcessRows(dataset, rows, process_index, process_count)
  dataset = dataset.batch(rows, drop_remainder=True, batch_fn=_stack)
  return _iterate(dataset[start_step:], workers, threads, buffer)


def eval_batches(
  source: Source,
  transform: Transform,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  limit: int | None = None,
  workers: int = 0,
  threads: int = 2,
  buffer: int = 4,
) -> Batches:
  """Returns every record once, in order; every process gets the same number of batches.

  The transform gets rng None. Global batch s holds records [s B, (s + 1) B); the last one is
  padded with rows of zeros, so that every batch has the same shape and no record counts twice
  (docs/official.md item 40).

  Args:
    source: records.
    transform: turns a record into an example.
    batch_size: rows of the global batch, over all processes.
    process_index: this process, 0 <= process_index < process_count.
    process_count: number of processes that share a global batch.
    limit: number of records, from the first; None = all.
    workers: Grain worker processes; 0 = threads of this process.
    threads: threads that make batches when workers is 0.
    buffer: batches made ahead.

  Returns:
    Iterator over {key: array[b, ...]}: the keys of the transform and mask bool[b], False for rows
    that are padding.

  Raises:
    ValueError: as for `train_batches`, and for a limit below 1.
  """
  _check(source, batch_size, process_index, process_count)
  if limit is not None and limit < 1:
    raise ValueError(f"limit must be at least 1 record (or None for all), got {limit}.")
  count = len(source) if limit is None else min(limit, len(source))
  rows = batch_size // process_count
  padded = -(-count // batch_size) * batch_size
  dataset = grain.MapDataset.range(padded).map(_Example(source, transform, count))
  dataset = _ProcessRows(dataset, rows, process_index, process_count)
  return _iterate(dataset.batch(rows, batch_fn=_stack), workers, threads, buffer)


def _check(source, batch_size, process_index, process_count):
  if not len(source):
    raise ValueError("The data source is empty: there is nothing to make batches of.")
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size {batch_size} must be a positive multiple of the number of "
      f"processes, {process_count}."
    )
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index {process_index} is not in [0, {process_count}).")


def _stack(examples):
  """List of {key: array[...]} -> {key: array[b, ...]}."""
  try:
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}
  except (KeyError, ValueError) as error:
    raise ValueError(
      "The transform gives examples of different keys or shapes, which cannot be "
      f"put into one batch: {error}"
    ) from error


def _iterate(batches, workers, threads, buffer):
  if not workers:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer if threads else 0)
    return iter(batches.to_iter_dataset(options))
  # Grain reads absl flags when it starts a process and fails if nobody has parsed them, as in a
  # notebook or under pytest.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  options = grain.MultiprocessingOptions(workers, max(1, buffer // workers))
  # Batches come in shared memory, which logs errors when it outlives the workers: return copies.
  return iter(dataset.mp_prefetch(options).map(_copy))


def _copy(batch):
  return {key: np.array(value) for key, value in batch.items()}
