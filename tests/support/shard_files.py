"""Shards of small pictures with captions: tars as img2dataset writes them."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

COLORS = ["red", "green", "blue", "grey", "white", "black"]
THINGS = ["cat", "dog", "bird", "tree", "house"]


def picture(number, kind="JPEG"):
  """Returns the encoded bytes of an image that differs from all others."""
  file = io.BytesIO()
  pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), np.uint8)
  Image.fromarray(pixels).resize((40, 32), Image.NEAREST).save(file, kind)
  return file.getvalue()


def caption(number):
  return f"A {COLORS[number % 6]} {THINGS[number % 5]}, number {number}"


def pair(number, **changes):
  """Returns the members {extension: bytes} of a pair as img2dataset writes them.

  A change to None removes a member.
  """
  about = {"key": f"{number:05d}", "caption": caption(number), "status": "success", "width": 40}
  members = {
    "jpg": picture(number),
    "json": json.dumps(about).encode(),
    "txt": caption(number).encode(),
  } | changes
  return {extension: data for extension, data in members.items() if data is not None}


def tar_bytes(pairs, form=tarfile.USTAR_FORMAT):
  """Returns a tar of {key: members} or of a list of (name, bytes)."""
  file = io.BytesIO()
  members = (
    pairs
    if isinstance(pairs, list)
    else [
      (f"{key}.{extension}", data)
      for key, members in pairs.items()
      for extension, data in members.items()
    ]
  )
  with tarfile.open(fileobj=file, mode="w", format=form) as tar:
    for name, data in members:
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return file.getvalue()


def numbered(numbers):
  """Returns {key: members} of pairs."""
  return {f"{number:05d}": pair(number) for number in numbers}


def write(folder, sizes=(1, 7, 3), first=0):
  """Writes 00000.tar, 00001.tar, ... with `sizes` pairs, numbered from `first`.

  Returns the pattern of all.
  """
  folder.mkdir(exist_ok=True)
  for shard, size in enumerate(sizes):
    (folder / f"{shard:05d}.tar").write_bytes(tar_bytes(numbered(range(first, first + size))))
    (folder / f"{shard:05d}.parquet").write_bytes(b"statistics of img2dataset")
    first += size
  return f"{folder}/{{00000..{len(sizes) - 1:05d}}}.tar"
