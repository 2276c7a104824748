"""The tiny grounding run of the tests: config and painted rectangles."""

import importlib.util
import io
import json
import pickle

import numpy as np
from PIL import Image

from tests.support import tiny_run

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def config(arg="tiny", **changes):
  """configs/grounding.py with `arg`; `changes` are written section__field=value."""
  spec = importlib.util.spec_from_file_location(
    "grounding_config", tiny_run.ROOT / "configs" / "grounding.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(arg)
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return c


def painted(height, width, **boxes):
  """u8[H, W, 3]: grey, with a rectangle of each named colour at its box (x1, y1, x2, y2)."""
  image = np.full((height, width, 3), 128, np.uint8)
  for colour, (x1, y1, x2, y2) in boxes.items():
    image[y1:y2, x1:x2] = COLOURS[colour]
  return image


def frame_of(image, colour):
  """Corners of the pixels that are nearer to a colour than half way, or None."""
  near = np.abs(image.astype(int) - COLOURS[colour]).max(-1) < 100
  if not near.any():
    return None
  rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
  return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def legacy(value):
  """Returns a file as torch.save wrote it before PyTorch 1.6.

  It has a magic number, version, system, the object and its storages.
  """
  parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, value, [])
  return b"".join(pickle.dumps(part, 2) for part in parts)


def png(image):
  """u8[H, W, 3] -> encoded bytes."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  return file.getvalue()


def write_jsonl(folder, entries):
  """train.jsonl and val.jsonl with the entries, and the images they name that are not there yet."""
  for name in ("train.jsonl", "val.jsonl"):
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
  for entry in entries:
    if not (folder / entry["image"]).exists():
      (folder / entry["image"]).write_bytes(
        png(painted(40, 60, red=(10, 10, 30, 30), blue=(40, 5, 55, 20)))
      )
