"""data.json of a run: a fingerprint of the training data, which a resumed run must share."""

import hashlib
import json
import os
from collections.abc import Sized
from typing import Any

import jax

from mplug_jax import data as data_lib
from mplug_jax.config import Config
from mplug_jax.data.storage import remote, shards
from mplug_jax.runtime import atomic_files, files

FILE = "data.json"

_FIXED = ("scenes", "scene_captions", "clips", "easy_vqa")  # sources without files of the user
_WHOLE = 64 << 20  # bytes; of a larger annotation file, blocks are read
_TEXTS = 200  # records of a source without annotation files whose texts are read


def fingerprint(config: Config, source: Sized) -> dict[str, Any]:
  """Returns what identifies the training data, without reading images.

  Args:
    config: config of the run.
    source: training records.

  Returns:
    {"records": number, "files": [{"name", "bytes", "hash"}, ...]}. The hash of an annotation file
    is that of its bytes, of one above 64 MiB that of 16 blocks; that of shards of their names and
    sizes. A source without such files has "texts" instead, the hash of texts of its records.
    Generated data, and those of a package, follow from the config: {}.
  """
  if config.data.name in _FIXED:
    return {}
  names = _names(config.data)
  listed = {"records": len(source), "files": [_file(name) for name in names]}
  if names:
    return listed
  digest = hashlib.blake2b(digest_size=16)
  for text in data_lib.examples_module(config).texts(source, _TEXTS):
    digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
  return listed | {"texts": digest.hexdigest()}


def _names(data: Config) -> list[str]:
  """Returns the training files of config.data."""
  if data.name == "transvg":
    from mplug_jax.data.sources import grounding

    return [str(path) for path in grounding.transvg_files(data, "train")]
  return list(data.get("train_files") or ())


def _file(name: str) -> dict[str, Any]:
  if not shards.is_pattern(name):
    return {"name": name, "bytes": os.path.getsize(name), "hash": files.digest(name, _WHOLE)}
  size = 0
  digest = hashlib.blake2b(digest_size=16)
  for path in remote.expand(name):
    length = 0 if remote.is_remote(path) else os.path.getsize(path)
    digest.update(f"{os.path.basename(path)} {length}\n".encode())
    size += length
  return {"name": name, "bytes": size, "hash": digest.hexdigest()}


def check(config: Config, workdir: str, source: Sized, resuming: bool) -> None:
  """Writes the fingerprint of the training data, after comparing it with that of a run to resume.

  A run without one, of an earlier version, gets one.

  Args:
    config: config of the run.
    workdir: run folder.
    source: training records.
    resuming: whether the folder holds a checkpoint.

  Raises:
    ValueError: the run was trained on other data.
  """
  path = os.path.join(workdir, FILE)
  present = fingerprint(config, source)
  if not present:
    return
  earlier = files.open_path(path)
  if resuming and earlier.exists():
    if differences := _differences(json.loads(earlier.read_text(encoding="utf-8")), present):
      raise ValueError(
        f"{workdir} holds a run on other training data and cannot be resumed with these "
        f"({'; '.join(differences)}). Restore the data, choose another --workdir, or delete {path} "
        "to continue all the same."
      )
  elif jax.process_index() == 0:
    atomic_files.write_json(path, present)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Returns how two fingerprints differ, [] if they do not."""
  changed = []
  for old, new in zip(before["files"], now["files"]):
    if old["hash"] != new["hash"]:
      size = (
        f"{new['bytes']:,} bytes instead of {old['bytes']:,}"
        if new["bytes"] != old["bytes"]
        else f"other content in {new['bytes']:,} bytes"
      )
      changed.append(f"{new['name']}: {size}")
  if len(before["files"]) != len(now["files"]):
    changed.append(f"{len(now['files'])} files instead of {len(before['files'])}")
  if before.get("texts") != now.get("texts"):
    changed.append("other texts")
  # Of the same files, versions may leave out different entries.
  if changed and before["records"] != now["records"]:
    changed.append(f"{now['records']:,} records instead of {before['records']:,}")
  return changed
