"""Statements about images: the official JSON files of configs/nlvr2.py and configs/snli_ve.py."""

import re
from collections.abc import Iterator
from typing import Any

from mplug_jax.data.prepare import json_stream
from mplug_jax.data.prepare.dataset import Dataset
from mplug_jax.data.prepare.download import Download, Images, Wanted
from mplug_jax.data.prepare.writer import Output
from mplug_jax.data.storage import annotations, json_values

# Our split -> NLVR2's name of it; the test split is test1, the public one (test-P).
_NLVR2 = {"train": "train", "dev": "dev", "test": "test1"}


def _nlvr2_file(name: str) -> Wanted:
  names = tuple(f"{folder}{name}.json" for folder in ("", "data/", "nlvr2/data/"))
  return Wanted(f"NLVR2's {name} split", names)


def nlvr2(download: Download, out: Output) -> None:
  """Writes NLVR2: a statement about two images in each entry.

  Args:
    download: the downloaded files.
    out: where the files are written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  paths = dict(zip(_NLVR2, download.require(*map(_nlvr2_file, _NLVR2.values()))))
  entries = {split: out.entries(f"nlvr_{split}.json", "statements") for split in paths}
  for split, path in paths.items():
    name = _NLVR2[split]
    images = Images(
      download,
      f"the {name} images of NLVR2",
      (f"images/{name}", name, f"{name}_img.zip/images/{name}", f"{name}_img.zip/{name}"),
      out.folder,
    )
    for entry, location in _lines(path, ("identifier", "sentence", "label")):
      if entry["label"] not in ("True", "False"):
        raise ValueError(f"{location}: label {entry['label']!r} must be True or False.")
      pair = _nlvr2_pair(entry, name, images, location)
      if all(pair):
        entries[split].add(
          {
            "id": entry["identifier"],
            "sentence": entry["sentence"],
            "label": entry["label"],
            "images": pair,
          }
        )
    images.finish(out)
  out.command("nlvr2", "base", "data=nlvr2", f"root={out.folder}", mode="train")


def _nlvr2_pair(
  entry: dict[str, Any], name: str, images: Images, location: str
) -> list[str | None]:
  """Returns the names of the two images of an entry, None for a missing one."""
  # "train-10171-0-0" is the set, the images, and the number of the statement about them;
  # `directory` is that of training images.
  match = re.fullmatch(r"(\w+-\d+-\d+)-\d+", entry["identifier"])
  if not match or not match[1].startswith(f"{name}-"):
    raise ValueError(
      f"{location}: identifier {entry['identifier']!r} is not of the form {name}-1-2-3."
    )
  stem = match[1]
  if name == "train" and "directory" in entry:
    inside = f"{entry['directory']}/{stem}"
    # Training images are often in a single folder.
    if images.has(f"{inside}-img0.png") or not images.has(f"{stem}-img0.png"):
      stem = inside
  return [images(f"{stem}-img{side}.png") for side in (0, 1)]


_SNLI_VE = {
  split: Wanted(
    f"SNLI-VE's {split} split",
    tuple(f"{folder}snli_ve_{split}.jsonl" for folder in ("", "snli_ve/", "data/")),
  )
  for split in ("train", "dev", "test")
}
_LABELS = ("contradiction", "neutral", "entailment")


def snli_ve(download: Download, out: Output) -> None:
  """Writes SNLI-VE, which has the images of Flickr30k.

  Args:
    download: the downloaded files.
    out: where the files are written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  paths = dict(zip(_SNLI_VE, download.require(*_SNLI_VE.values())))
  folders = (
    "flickr30k-images",
    "flickr30k_images",
    "images",
    "flickr30k-images.zip/flickr30k-images",
  )
  images = Images(download, "the images of Flickr30k", folders, f"{out.folder}/flickr30k-images")
  entries = {split: out.entries(f"ve_{split}.json", "sentences") for split in paths}
  undecided = 0
  for split, path in paths.items():
    for entry, location in _lines(path, ("Flickr30K_ID", "sentence2", "gold_label")):
      if entry["gold_label"] == "-":  # the annotators of SNLI had no majority
        undecided += 1
        continue
      if entry["gold_label"] not in _LABELS:
        raise ValueError(
          f"{location}: gold_label {entry['gold_label']!r} is not one of {', '.join(_LABELS)}, -."
        )
      if image := images(f"{entry['Flickr30K_ID']}.jpg"):  # the config adds .jpg
        entries[split].add(
          {
            "image": image.removesuffix(".jpg"),
            "sentence": entry["sentence2"],
            "label": entry["gold_label"],
          }
        )
  images.finish(out)
  if undecided:
    out.note(f"{undecided:,} sentences without a majority label were left out")
  out.command("snli_ve", "base", "data=snli_ve", f"root={out.folder}", mode="train")


def _lines(path: str, keys: tuple[str, ...]) -> Iterator[tuple[dict[str, Any], str]]:
  """Yields (entry, location) of JSON lines whose `keys` are strings; raises ValueError."""
  for entry, location in annotations.lines(path, json_values.Checks()):
    json_stream.check(entry, dict.fromkeys(keys, str), location)
    yield entry, location


NLVR2 = Dataset("NLVR2: statements about two images.", nlvr2)
SNLI_VE = Dataset("SNLI-VE: hypotheses about the images of Flickr30k.", snli_ve)
