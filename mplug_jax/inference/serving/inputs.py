"""Converts images and texts to the arrays of an exported function, as serving.json describes them.

`tools.export_serving` copies this file beside serving.json; it needs no mplug_jax.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def read_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a safetensors file of float32 tensors, memory-mapped, as {name: array}."""
  raw = np.memmap(path, np.uint8, "r")
  start = 8 + int(raw[:8].view("<u8")[0])
  header = json.loads(bytes(raw[8:start]))
  header.pop("__metadata__", None)
  return {
    name: raw[start:][slice(*entry["data_offsets"])].view("<f4").reshape(entry["shape"])
    for name, entry in header.items()
  }


class Tokenizer:
  """Converts a text to a row of token ids, and ids to text."""

  def __init__(self, folder: str | os.PathLike, about: Mapping[str, Any]):
    """Loads the tokenizer of an exported folder.

    Args:
      folder: the exported folder.
      about: entry "tokenizer" of serving.json.
    """
    self._about = about
    self._wordpiece = about["kind"] == "wordpiece"
    path = str(pathlib.Path(folder) / about["file"])
    self._model: Any
    if self._wordpiece:
      import tokenizers

      self._model = tokenizers.Tokenizer.from_file(path)
    else:
      import sentencepiece

      self._model = sentencepiece.SentencePieceProcessor(path)

  def _encode(self, text: str) -> list[int]:
    """Returns the token ids of a text, without special tokens."""
    if self._wordpiece:
      return self._model.encode(text, add_special_tokens=False).ids
    return self._model.encode(text)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of one row of token ids."""
    special = {self._about[name] for name in ("pad_id", "bos_id", "eos_id")}
    kept = [int(i) for i in ids if int(i) not in special]
    if not self._wordpiece:
      return self._model.decode(kept).strip()
    text = " ".join(map(self._model.id_to_token, kept)).replace(" ##", "")
    for old, new in self._about["clean_up"]:
      text = text.replace(old, new)
    return text.strip()

  def row(self, text: str, entry: Mapping[str, Any]) -> list[int]:
    """Returns entry["length"] token ids.

    Args:
      text: a text.
      entry: an input of serving.json.
    """
    text = text.lower() if entry["lower"] else text
    spaces = dict.fromkeys(entry["spaces"], " ")
    deleted = dict.fromkeys(entry["deleted"], "")
    text = text.translate(str.maketrans({**spaces, **deleted}))
    if entry["max_words"]:
      text = " ".join(text.replace("<person>", "person").split()[: entry["max_words"]])
    length = entry["length"]
    ids = [self._about["bos_id"], *self._encode(text)]
    if entry["ends"] != "open":
      ids.append(self._about["eos_id"])
    if len(ids) > length:
      last = ids[-1] if entry["ends"] == "kept" else ids[length - 1]
      ids = [*ids[: length - 1], last]
    return ids + [self._about["pad_id"]] * (length - len(ids))


def read_image(image: Any, entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the arrays of an image.

  Args:
    image: path, file or PIL image; or a list of these, the frames of a clip or the images of a
      pair.
    entry: entry "image" of serving.json.

  Returns:
    {"image": u8[S, S, 3], "placed": i32[4], left, top, right and bottom on that square, "size":
    i32[2], original width and height}; for a list of N {"image": u8[N, S, S, 3]}.
  """
  if isinstance(image, list | tuple):
    return {"image": np.stack([read_image(one, entry)["image"] for one in image])}
  opened = image if isinstance(image, Image.Image) else Image.open(image)
  upright = ImageOps.exif_transpose(opened).convert("RGB")
  side = entry["size"]
  if entry["resize"] == "stretch":
    square = upright.resize((side, side), Image.Resampling.BICUBIC)
    placed = (0, 0, side, side)
  else:
    width, height = (max(1, round(side / max(upright.size) * n)) for n in upright.size)
    resized = upright.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (round((side - n) / 2 - 0.1) for n in resized.size)
    square = Image.new("RGB", (side, side))
    square.paste(resized, (left, top))
    placed = (left, top, left + width, top + height)
  return {
    "image": np.asarray(square),
    "placed": np.array(placed, np.int32),
    "size": np.array(upright.size, np.int32),
  }


def make_batch(
  about: Mapping[str, Any],
  function: str,
  tokenizer: Tokenizer,
  images: Sequence[Any] = (),
  texts: Sequence[Any] = (),
) -> dict[str, np.ndarray]:
  """Returns the inputs of an exported function.

  Args:
    about: content of serving.json.
    function: name of the function.
    tokenizer: the tokenizer of the export.
    images: one per row, see `read_image`.
    texts: one per row, or a list per row; all lists have the same length.
  """
  entries = about["functions"][function]["inputs"]
  arrays = [read_image(image, about["image"]) for image in images] if "image" in entries else []
  batch = {}
  for name, entry in entries.items():
    if entry["is"] == "text":
      listed = [[text] if isinstance(text, str) else text for text in texts]
      rows = [[tokenizer.row(text, entry) for text in row] for row in listed]
      shape = [-1 if size in ("b", "q") else size for size in entry["shape"][1:]]
      batch[name] = np.array(rows, np.int32).reshape([len(rows), *shape])
    else:
      values = np.stack([row[entry["is"]] for row in arrays])
      batch[name] = values if values.ndim == len(entry["shape"]) else values[:, None]
  return batch
