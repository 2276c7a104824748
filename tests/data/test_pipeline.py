"""Order, randomness, sharding and resumption of batches, against the record numbers."""

import collections
import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest

from mplug_jax.data import pipeline


class Squares:
  """Record i is i * i."""

  def __init__(self, length):
    self._length = length

  def __len__(self):
    return self._length

  def __getitem__(self, index):
    return index * index


def noisy(index, record, rng):
  """A record with three random draws, so that order and randomness show in the batch."""
  noise = np.zeros(3) if rng is None else rng.random(3)
  return {"index": np.int32(index), "record": np.int64(record), "noise": noise}


class FailsAt:
  """`noisy`, except for one record."""

  def __init__(self, index):
    self._index = index

  def __call__(self, index, record, rng):
    if index == self._index:
      raise KeyError("color")
    return noisy(index, record, rng)


def ragged(index, record, rng):
  return {"x": np.zeros(1 + index % 2)}


def take(count, **arguments):
  batches = pipeline.train_batches(
    **{"source": Squares(10), "transform": noisy, "batch_size": 8, "seed": 3, **arguments}
  )
  result = list(itertools.islice(batches, count))
  batches.close()
  return result


@functools.cache
def _longest():
  return take(25)


def reference(count):
  """Equals take(count); the order of ten records takes milliseconds a record."""
  return _longest()[:count]


def assert_same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], key)


def joined(parts):
  """Batches of processes 0, 1, ... -> global batches."""
  return [
    {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]


def test_batch_contents():
  batch = reference(1)[0]
  assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
    "index": ((8,), np.int32),
    "record": ((8,), np.int64),
    "noise": ((8, 3), np.float64),
    "mask": ((8,), np.bool_),
  }
  np.testing.assert_array_equal(batch["record"], batch["index"].astype(np.int64) ** 2)
  assert batch["mask"].all()


def test_every_epoch_has_every_record_once_in_a_new_order():
  order = np.concatenate([batch["index"] for batch in reference(25)]).reshape(20, 10)
  np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(10), (20, 1)))
  assert len({tuple(epoch) for epoch in order}) == 20


def test_random_draws_differ_between_rows_epochs_and_seeds():
  noise = np.concatenate([batch["noise"] for batch in reference(10)])
  assert len(np.unique(noise)) == noise.size
  assert not np.intersect1d(noise, np.concatenate([b["noise"] for b in take(10, seed=4)])).size


@pytest.mark.parametrize(("records", "block"), [(100, 1), (100, 3), (101, 5), (7, 5), (7, 100)])
def test_block_shuffle_has_every_record_once(records, block):
  order = np.concatenate(
    [batch["index"] for batch in take(3, source=Squares(records), batch_size=records, block=block)]
  )
  order = order.reshape(3, records)
  np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(records), (3, 1)))
  assert len({tuple(epoch) for epoch in order}) == 3
  assert (np.diff(order) != 1).any()


def test_block_shuffle_keeps_consecutive_records_close():
  """Of 16 blocks that are shuffled together, all records come before those of the next 16."""
  batches = take(10, source=Squares(6400), batch_size=640, block=40)
  for batch in batches:
    assert len(np.unique((batch["index"] - batches[0]["index"].min()) // 40)) <= 33
  assert len(np.unique(np.concatenate([batch["index"] for batch in batches]))) == 6400
  assert np.median(np.abs(np.diff(batches[0]["index"]))) > 400


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batch_does_not_depend_on_the_number_of_processes(process_count):
  parts = [take(6, process_index=p, process_count=process_count) for p in range(process_count)]
  assert parts[0][0]["index"].shape == (8 // process_count,)
  assert_same(joined(parts), reference(6))


@pytest.mark.parametrize(("threads", "buffer"), [(0, 1), (1, 1), (4, 7)])
def test_threads_do_not_change_the_batches(threads, buffer):
  assert_same(take(12, threads=threads, buffer=buffer), reference(12))


@pytest.mark.parametrize("start_step", [1, 4, 123_456])
def test_resuming_continues_the_same_order(start_step):
  if start_step < 100:
    assert_same(take(3, start_step=start_step), reference(start_step + 3)[start_step:])
  else:
    assert_same(take(2, start_step=start_step)[1:], take(1, start_step=start_step + 1))


def until_error(transform, **arguments):
  batches = pipeline.train_batches(
    Squares(100),
    transform,
    batch_size=8,
    seed=3,
    start_step=2,
    process_index=1,
    process_count=2,
    **arguments,
  )
  result = []

  def read():
    while True:
      result.append(next(batches))

  with pytest.raises(ValueError, match=r"^Record \d+ of the data cannot be used: Key") as error:
    read()
  batches.close()
  return result, str(error.value)


def test_worker_processes_change_neither_batches_nor_errors():
  transform = FailsAt(int(take(10, source=Squares(100))[9]["index"][6]))
  batches, message = until_error(transform, workers=2)
  expected, expected_message = until_error(transform)
  assert len(expected) == 7
  assert message == expected_message
  assert_same(batches, expected)


def test_batch_larger_than_the_source():
  batch = take(1, source=Squares(3), batch_size=8)[0]
  assert sorted(collections.Counter(batch["index"].tolist()).values()) == [2, 3, 3]
  assert len(np.unique(batch["noise"])) == 24


@pytest.mark.parametrize("threads", [0, 2])
def test_failing_record_is_named(threads):
  with pytest.raises(ValueError, match=r"^Record 5 of the data cannot be used: KeyError\('color'"):
    take(3, transform=FailsAt(5), threads=threads)
  batches = pipeline.eval_batches(Squares(8), FailsAt(5), batch_size=4, threads=threads)
  next(batches)
  with pytest.raises(ValueError, match="Record 5 of the data"):
    next(batches)
  batches.close()


def test_examples_of_different_shapes_are_an_error():
  with pytest.raises(ValueError, match="cannot be put into one batch"):
    take(1, transform=ragged)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"source": Squares(0)}, "source is empty"),
    ({"batch_size": 0}, "positive multiple"),
    ({"batch_size": 6, "process_count": 4}, "batch_size 6 must be a positive multiple"),
    ({"process_index": 2, "process_count": 2}, "process_index 2 is not in"),
    ({"start_step": -1}, "start_step"),
    ({"block": -1}, "block must be at least 0"),
  ],
)
def test_invalid_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    take(1, **arguments)


@pytest.mark.parametrize(
  ("records", "batch_size", "process_count", "limit"),
  [
    (10, 4, 1, None),
    (10, 4, 2, None),
    (10, 4, 4, None),
    (9, 8, 4, None),
    (12, 4, 2, None),
    (3, 8, 4, None),
    (10, 4, 2, 5),
    (10, 4, 2, 99),
  ],
)
def test_evaluation_reads_every_record_once_in_order(records, batch_size, process_count, limit):
  parts = [
    list(
      pipeline.eval_batches(
        Squares(records),
        noisy,
        batch_size=batch_size,
        process_index=p,
        process_count=process_count,
        limit=limit,
      )
    )
    for p in range(process_count)
  ]
  count = min(records, limit or records)
  assert {len(part) for part in parts} == {-(-count // batch_size)}
  batches = joined(parts)
  assert all(batch["mask"].shape == (batch_size,) for batch in batches)
  mask = np.concatenate([batch["mask"] for batch in batches])
  index = np.concatenate([batch["index"] for batch in batches])
  np.testing.assert_array_equal(index[mask], np.arange(count))
  np.testing.assert_array_equal(mask, np.arange(len(mask)) < count)
  assert not index[~mask].any()


def test_evaluation_limit_must_be_positive():
  with pytest.raises(ValueError, match="limit must be at least 1"):
    pipeline.eval_batches(Squares(3), noisy, batch_size=1, limit=0)


SCRIPT = """
import itertools
from tests.data import test_pipeline
if __name__ == "__main__":
  kept = test_pipeline.take(3, workers=1)
  print(len(kept))
"""


def test_worker_processes_need_no_parsed_flags_and_log_nothing(tmp_path):
  script = tmp_path / "script.py"
  script.write_text(SCRIPT)
  root = pipeline.__file__.rsplit("/mplug_jax/", 1)[0]
  result = subprocess.run(
    [sys.executable, str(script)],
    capture_output=True,
    text=True,
    check=False,
    env={"PYTHONPATH": root, "PATH": ""},
    timeout=60,
  )
  assert result.stdout == "3\n", result.stderr
  assert result.stderr == ""
