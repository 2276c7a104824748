"""Converts tar shards to ArrayRecord files, see storage/shards.py.

The files have one size and no bad pairs, and any disk reads them at random.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from mplug_jax.data.errors import ImageError
from mplug_jax.data.images import ops
from mplug_jax.data.storage import remote, shards
from mplug_jax.runtime import atomic_files

_NAMED = 20  # bad pairs of a shard that are named
_PLAN = "conversion.json"


@dataclasses.dataclass
class Shard:
  """The content of one written file.

  Attributes:
    name: its name without suffix.
    pairs: pairs written.
    bad: pairs left out.
    named: sentences on the first of them.
  """

  name: str
  pairs: int
  bad: int
  named: list[str]


def convert(
  patterns: Sequence[str],
  folder: str,
  records_per_shard: int = 10_000,
  workers: int = 1,
  verify: bool = False,
  on_shard: Callable[[Shard], None] = lambda shard: None,
) -> tuple[list[Shard], Sequence[str]]:
  """Writes pairs-00000-of-00012.array_record and so on, each completely or not at all.

  Files that exist are kept.

  Args:
    patterns: names or patterns of shards, see shards.load.
    folder: where the files are written.
    records_per_shard: pairs of the source for each file, including bad ones.
    workers: processes.
    verify: decode every image, and leave out those that cannot be decoded.
    on_shard: called with each Shard.

  Returns:
    The written shards, and sentences on what the source holds besides pairs.

  Raises:
    ValueError: as in shards.load, or `folder` holds another conversion.
    OSError: as in shards.load, or `folder` cannot be written.
  """
  if remote.is_remote(folder):
    raise ValueError(f"{folder} must be a folder on a disk; write there and copy the files.")
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
  written: list[Shard] = []
  with contextlib.ExitStack() as stack:
    if workers < 2:
      results = (write(*job, source=source) for job in enumerate(names))
    else:
      pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _keep, (source,))
      stack.enter_context(pool)
      stack.callback(pool.shutdown, cancel_futures=True)  # an error ends the conversion at once
      results = pool.map(write, range(count), names)
    for shard in results:
      on_shard(shard)
      written.append(shard)
  return written, (*source.left_out, *source.ignored)


def _check_plan(folder: str, plan: Mapping[str, Any]) -> None:
  """Stores the settings of a conversion in `folder`; raises ValueError if it has others."""
  path = os.path.join(folder, _PLAN)
  os.makedirs(folder, exist_ok=True)
  try:
    with open(path, encoding="utf-8") as file:
      if json.load(file) != plan:
        raise ValueError(
          f"{folder} holds the conversion of other shards, or with other options: see {path}, and "
          "choose another folder."
        )
  except FileNotFoundError:
    atomic_files.write_json(path, plan)
  except json.JSONDecodeError:
    raise ValueError(f"{path} is not valid JSON; choose another folder.") from None


def _common_folder(source: shards.ShardImages) -> str:
  """Returns the common beginning of all paths of shards, which keys leave out."""
  folders = sorted({os.path.dirname(part.path) for part in source.parts})
  if len(folders) == 1:
    return folders[0]
  return os.path.commonprefix(folders).rpartition("/")[0]


_kept: list[shards.ShardImages] = []  # the source, in a worker process


def _keep(source: shards.ShardImages) -> None:
  _kept[:] = [source]


def _write(
  number: int,
  name: str,
  *,
  folder: str,
  size: int,
  verify: bool,
  common: str,
  source: shards.ShardImages | None = None,
) -> Shard:
  """Writes the file of one shard unless it exists."""
  source = source or _kept[0]
  path = os.path.join(folder, f"{name}.array_record")
  report = os.path.join(folder, f"{name}.json")
  if os.path.exists(path) and os.path.exists(report):
    with open(report, encoding="utf-8") as file:
      return Shard(**json.load(file))
  shard = Shard(name, 0, 0, [])
  temporary = f"{path}.tmp{os.getpid()}"
  numbers = range(number * size, min((number + 1) * size, len(source)))
  try:
    _write_pairs(temporary, source, numbers, verify, common, shard)
    atomic_files.write_json(report, dataclasses.asdict(shard))
    os.replace(temporary, path)
  finally:
    if os.path.exists(temporary):
      os.remove(temporary)
  return shard


def _write_pairs(
  path: str,
  source: shards.ShardImages,
  numbers: Iterable[int],
  verify: bool,
  common: str,
  shard: Shard,
) -> None:
  """Writes the usable pairs of `numbers`, and counts them in `shard`."""
  import msgpack

  # A compiled module without a stub.
  from array_record.python import (
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
  )

  try:
    # Uncompressed, because images are compressed.
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
    for number in numbers:
      part, position = source.find(number)
      try:
        key, image, caption = part.read(position)
        if verify:
          ops.decode_image(image, f"{part.path}/{key}")
      except ImageError as error:
        shard.bad += 1
        if len(shard.named) < _NAMED:
          shard.named.append(str(error))
        continue
      key = f"{part.path.removeprefix(common).lstrip('/').rsplit('.', 1)[0]}/{key}"
      record: Any = msgpack.packb({"image": image, "caption": caption, "key": key})
      writer.write(record)
      shard.pairs += 1
    writer.close()
  except RuntimeError as error:  # raised by the package
    reason = str(error).splitlines()[0].rstrip(".")
    raise OSError(f"{path} cannot be written: {reason}.") from None
