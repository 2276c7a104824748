"""Tar shards -> ArrayRecord files as shards.py reads them: of one size, without bad pairs, for reading at random from any disk."""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops
from mplug_jax.data.storage import remote, shards
from mplug_jax.runtime import atomic_files

_NAMED = 20  # bad pairs of a shard that are named
_PLAN = "conversion.json"


@dataclasses.dataclass
class Shard:
  """What one written file holds. bad: pairs left out; named: sentences on the first of them."""

  name: str
  pairs: int
  bad: int
  named: list


def convert(
  patterns, folder, records_per_shard=10_000, workers=1, verify=False, on_shard=lambda shard: None
):
  """Writes pairs-00000-of-00012.array_record and so on into `folder`, each whole or not at all.

  Those that are there are kept.

  Args:
    patterns: see shards.load. records_per_shard: pairs of the source for each file, bad ones
      included.
    workers: processes. verify: decode every image, and leave out those that cannot be.
    on_shard: called with each Shard.

  Returns:
    (list of Shard, sentences on what the source holds beside its pairs).

  Raises:
    ValueError, OSError: as of shards.load; `folder` holds another conversion, or cannot be written.
  """
  if remote.is_remote(folder):
    raise ValueError(f"{folder} must be a folder on a disk; copy the files from there.")
  source = shards.load(patterns)
  count = -(-len(source) // records_per_shard)
  _check_plan(
    folder,
    {
      "records_per_shard": records_per_shard,
      "verify": verify,
      "sources": [[part.path, remote.state(part.path)[1]] for part in source.parts],
    },
  )
  names = [f"pairs-{number:05d}-of-{count:05d}" for number in range(count)]
  write = functools.partial(
    _write, folder=folder, size=records_per_shard, verify=verify, common=_common_folder(source)
  )
  done = []
  with contextlib.ExitStack() as stack:
    if workers < 2:
      results = (write(*job, source=source) for job in enumerate(names))
    else:
      pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _keep, (source,))
      stack.enter_context(pool)
      stack.callback(
        pool.shutdown, cancel_futures=True
      )  # after an error the others need not be written first
      results = pool.map(write, range(count), names)
    for shard in results:
      on_shard(shard)
      done.append(shard)
  return done, source.left_out


def _check_plan(folder, plan):
  """Notes what is converted, and how, in `folder`.

  Raises ValueError if something else is noted there.
  """
  path = os.path.join(folder, _PLAN)
  os.makedirs(folder, exist_ok=True)
  try:
    with open(path, encoding="utf-8") as file:
      if json.load(file) != plan:
        raise ValueError(
          f"{folder} holds the conversion of other shards, or with other options: see {path}, and "
          f"choose another folder."
        )
  except FileNotFoundError:
    atomic_files.write_json(path, plan)
  except json.JSONDecodeError:
    raise ValueError(f"{path} is not valid JSON; choose another folder.") from None


def _common_folder(source):
  """What the paths of all shards begin with, to be left out of keys."""
  folders = {os.path.dirname(part.path) for part in source.parts}
  return (
    folders.pop() if len(folders) == 1 else os.path.commonprefix(sorted(folders)).rpartition("/")[0]
  )


_kept = []  # the source, in a worker process


def _keep(source):
  _kept[:] = [source]


def _write(number, name, *, folder, size, verify, common, source=None):
  """Writes the file of one shard unless it is there; returns the Shard."""
  source = source or _kept[0]
  path, report = (os.path.join(folder, name + end) for end in (".array_record", ".json"))
  if os.path.exists(path) and os.path.exists(report):
    with open(report, encoding="utf-8") as file:
      return Shard(**json.load(file))
  done = Shard(name, 0, 0, [])
  temporary = f"{path}.tmp{os.getpid()}"
  try:
    _write_pairs(
      temporary,
      source,
      range(number * size, min((number + 1) * size, len(source))),
      verify,
      common,
      done,
    )
    atomic_files.write_json(report, dataclasses.asdict(done))
    os.replace(temporary, path)
  finally:
    if os.path.exists(temporary):
      os.remove(temporary)
  return done


def _write_pairs(path, source, numbers, verify, common, done):
  """Writes the pairs that can be used, and counts in `done`."""
  import msgpack
  from array_record.python import array_record_module

  try:
    writer = array_record_module.ArrayRecordWriter(
      path, "group_size:1,uncompressed"
    )  # images are compressed
    for number in numbers:
      part, place = source.place(number)
      try:
        key, image, caption = part.read(place)
        if verify:
          ops.decode_image(image, f"{part.path}/{key}")
      except ImageError as error:
        done.bad += 1
        done.named += [str(error)] * (len(done.named) < _NAMED)
        continue
      key = f"{part.path.removeprefix(common).lstrip('/').rsplit('.', 1)[0]}/{key}"
      writer.write(msgpack.packb({"image": image, "caption": caption, "key": key}))
      done.pairs += 1
    writer.close()
  except RuntimeError as error:  # of the package
    raise OSError(f"{path} cannot be written: {str(error).splitlines()[0].rstrip('.')}.") from None
