"""Images and texts -> the arrays of an exported function, as serving.json describes them.

Copied beside it: needs no mplug_jax.
"""

import json
import pathlib

import numpy as np
from PIL import Image, ImageOps


def read_weights(path):
  """A safetensors file of float32 -> {name: array}, mapped from the disk."""
  raw = np.memmap(path, np.uint8, "r")
  start = 8 + int(raw[:8].view("<u8")[0])
  header = json.loads(bytes(raw[8:start]))
  header.pop("__metadata__", None)
  return {
    name: raw[start:][slice(*x["data_offsets"])].view("<f4").reshape(x["shape"])
    for name, x in header.items()
  }


class Tokenizer:
  """Text -> rows of token ids, and back. about: the entry "tokenizer" of serving.json."""

  def __init__(self, folder, about):
    self._about, path = about, str(pathlib.Path(folder) / about["file"])
    if about["kind"] == "wordpiece":
      import tokenizers

      model = tokenizers.Tokenizer.from_file(path)
      self._pieces, self._token = (
        lambda text: model.encode(text, add_special_tokens=False).ids,
        model.id_to_token,
      )
    else:
      import sentencepiece

      model = sentencepiece.SentencePieceProcessor(path)
      self._pieces, self._join = model.encode, model.decode

  def _join(self, ids):
    text = " ".join(map(self._token, ids)).replace(" ##", "")
    for old, new in self._about["clean_up"]:
      text = text.replace(old, new)
    return text

  def decode(self, ids):
    """One row of ids -> text."""
    special = {self._about[name] for name in ("pad_id", "bos_id", "eos_id")}
    return self._join([int(i) for i in ids if int(i) not in special]).strip()

  def row(self, text, how):
    """A text -> list of how["length"] ids; how: an input of serving.json."""
    text = text.lower() if how["lower"] else text
    text = text.translate(
      str.maketrans({**dict.fromkeys(how["spaces"], " "), **dict.fromkeys(how["deleted"], "")})
    )
    if how["max_words"]:
      text = " ".join(text.replace("<person>", "person").split()[: how["max_words"]])
    ids, length = [self._about["bos_id"], *self._pieces(text)], how["length"]
    ids += [self._about["eos_id"]] * (how["ends"] != "open")
    if len(ids) > length:  # "kept": the end is not cut off with the rest
      ids = [*ids[: length - 1], ids[-1] if how["ends"] == "kept" else ids[length - 1]]
    return ids + [self._about["pad_id"]] * (length - len(ids))


def picture(image, how):
  """An image -> (u8[S, S, 3], its place on that canvas i32[4], its own width and height i32[2]).

  image: path, file, PIL image, or a list of those (frames of a clip, images of a pair), which gives
    u8[N, S, S, 3], None, None.
  how: the entry "image" of serving.json.
  """
  if isinstance(image, list | tuple):
    return np.stack([picture(x, how)[0] for x in image]), None, None
  image = ImageOps.exif_transpose(
    image if isinstance(image, Image.Image) else Image.open(image)
  ).convert("RGB")
  side, size = how["size"], image.size
  if how["resize"] == "stretch":
    return (
      np.asarray(image.resize((side, side), Image.BICUBIC)),
      np.array([0, 0, side, side], np.int32),
      np.array(size, np.int32),
    )
  image = image.resize([max(1, round(side / max(size) * n)) for n in size], Image.BILINEAR)
  left, top = (round((side - n) / 2 - 0.1) for n in image.size)
  canvas = Image.new("RGB", (side, side))
  canvas.paste(image, (left, top))
  return (
    np.asarray(canvas),
    np.array([left, top, left + image.width, top + image.height], np.int32),
    np.array(size, np.int32),
  )


def make_batch(about, function, tokenizer, images=(), texts=()):
  """-> {input: array} of an exported function.

  Args:
    about: serving.json. images: see `picture`. texts: one for each row, or a list of equally many
      for each.
  """
  batch, inputs = {}, about["functions"][function]["inputs"]
  pictures = [picture(image, about["image"]) for image in images] if "image" in inputs else []
  for name, how in inputs.items():
    if how["is"] == "text":
      rows = [
        [tokenizer.row(t, how) for t in ([text] if isinstance(text, str) else text)]
        for text in texts
      ]
      batch[name] = np.array(rows, np.int32).reshape(
        [len(rows), *(-1 if n in ("b", "q") else n for n in how["shape"][1:])]
      )
    else:
      values = np.stack([x[("image", "placed", "size").index(how["is"])] for x in pictures])
      batch[name] = values if values.ndim == len(how["shape"]) else values[:, None]
  return batch
