"""Statements about images: NLVR2 and SNLI-VE as they are distributed -> the official json files of configs/nlvr2.py and snli_ve.py."""

import re

from mplug_jax.data.prepare import json_stream
from mplug_jax.data.prepare.download import Images, Wanted
from mplug_jax.data.storage import annotations

_NLVR2 = {
  split: (
    name,
    Wanted(
      f"NLVR2's {name} split",
      tuple(f"{folder}{name}.json" for folder in ("", "data/", "nlvr2/data/")),
    ),
  )
  for split, name in (("train", "train"), ("dev", "dev"), ("test", "test1"))
}


def nlvr2(download, out):
  """NLVR2: lines of json and two images for each statement.

  Split test is test1, the public one (test-P).
  """
  paths = dict(zip(_NLVR2, download.require(*(wanted for _, wanted in _NLVR2.values()))))
  entries = {split: out.entries(f"nlvr_{split}.json", "statements") for split in paths}
  for split, path in paths.items():
    name = _NLVR2[split][0]
    images = Images(
      download,
      f"the {name} images of NLVR2",
      (f"images/{name}", name, f"{name}_img.zip/images/{name}", f"{name}_img.zip/{name}"),
      out.folder,
    )
    for entry, where in _lines(path, ("identifier", "sentence", "label")):
      # "train-10171-0-0": set, images, and the number of the statement about them; `directory` is
      # that of training images.
      match = re.fullmatch(r"(\w+-\d+-\d+)-\d+", entry["identifier"])
      if not match or not match[1].startswith(f"{name}-"):
        raise ValueError(
          f"{where}: identifier {entry['identifier']!r} is not of the form {name}-1-2-3."
        )
      if entry["label"] not in ("True", "False"):
        raise ValueError(f"{where}: label {entry['label']!r} must be True or False.")
      stem = (
        f"{entry['directory']}/{match[1]}"
        if split == "train" and "directory" in entry
        else match[1]
      )
      if not images.has(f"{stem}-img0.png") and images.has(
        f"{match[1]}-img0.png"
      ):  # many put all of them into one folder
        stem = match[1]
      pair = [images(f"{stem}-img{side}.png") for side in (0, 1)]
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


_SNLI_VE = {
  split: Wanted(
    f"SNLI-VE's {split} split",
    tuple(f"{folder}snli_ve_{split}.jsonl" for folder in ("", "snli_ve/", "data/")),
  )
  for split in ("train", "dev", "test")
}
_LABELS = ("contradiction", "neutral", "entailment")


def snli_ve(download, out):
  """SNLI-VE: lines of json, with the images of Flickr30k."""
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
    for entry, where in _lines(path, ("Flickr30K_ID", "sentence2", "gold_label")):
      if entry["gold_label"] == "-":  # of SNLI: its annotators had no majority
        undecided += 1
        continue
      if entry["gold_label"] not in _LABELS:
        raise ValueError(
          f"{where}: gold_label {entry['gold_label']!r} is not one of {', '.join(_LABELS)}, -."
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


def _lines(path, keys):
  """(entry, where) of lines of json, whatever the file is called.

  `keys`: strings that each must have. Raises ValueError.
  """
  for entry, where in annotations.lines(path):
    json_stream.check(entry, dict.fromkeys(keys, str), where)
    yield entry, where
