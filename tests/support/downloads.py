"""Small downloads of data sets in the layout in which they are distributed, and what the tests of tools.prepare_data do with them."""

import contextlib
import io
import json
import runpy
import shlex
import zipfile

import numpy as np
from PIL import Image

from mplug_jax import data
from mplug_jax.data.images import video
from mplug_jax.training import loop
from tests.support import tiny_run
from tools import prepare_data

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def picture(seed=0):
  """Encoded bytes of a small image."""
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)).save(
    file, "PNG"
  )
  return file.getvalue()


def write(folder, values):
  """Files below a folder: {name: bytes, text, or anything that is written as json}."""
  for name, value in values.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_bytes(value))


def write_zip(path, values):
  """As `write`, into a zip."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    for name, value in values.items():
      file.writestr(name, _bytes(value))


def _bytes(value):
  if isinstance(value, bytes):
    return value
  return (value if isinstance(value, str) else json.dumps(value)).encode()


def write_clips(folder, *names):
  """Clips of four frames."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    video.write_mp4(
      folder / name, np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    )


def lines(rows):
  """Rows -> text of json lines."""
  return "".join(json.dumps(row) + "\n" for row in rows)


def read(path):
  """The entries of a file that was written."""
  return (
    [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".jsonl"
    else json.loads(path.read_text())
  )


def _tool(name, root, *options):
  """-> (exit status, what the tool printed, what went to stderr)."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = prepare_data.main([name, f"--root={root}", *map(str, options)])
  return status, out.getvalue(), err.getvalue()


def prepare(name, root, *options):
  """Runs the tool, which must end well -> lines it printed."""
  status, printed, err = _tool(name, root, *options)
  assert (status, err) == (0, ""), err
  return printed.splitlines()


def refused(name, root, *messages, options=()):
  """Runs the tool, which must refuse with one sentence that holds the messages, and leave the folder as it is."""
  before = _files(root)
  status, printed, err = _tool(name, root, *options)
  assert (status, printed) == (1, "") and err.startswith("error: ") and err.count("\n") == 1, err
  for message in messages:
    assert message in err, err
  assert _files(root) == before


def run(config, workdir):
  """A whole run in this process -> the last line it printed."""
  with contextlib.redirect_stdout(io.StringIO()) as out:
    assert loop.train(config, str(workdir)) == 0
  return out.getvalue().splitlines()[-1]


def _files(root):
  return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def configs(printed, **changes):
  """The tiny configs of the commands that were printed.

  `changes` are written section__field=value.
  """
  found = []
  for line in printed:
    if line.startswith(("train: ", "evaluate: ")):
      words = shlex.split(line)
      name, _, arg = (
        next(word for word in words if word.startswith("--config="))
        .removeprefix("--config=configs/")
        .partition(".py:")
      )
      arg = ",".join(
        ["tiny", *(part for part in arg.split(",")[1:] if part not in ("clip=CLIP", "bert=BERT"))]
      )
      c = runpy.run_path(str(tiny_run.ROOT / "configs" / f"{name}.py"))["get_config"](arg)
      flags = dict(
        word.removeprefix("--config.").split("=", 1)
        for word in words
        if word.startswith("--config.")
      )
      del flags["tokenizer.path"]
      c.update_from_flattened_dict(
        {**flags, **{key.replace("__", "."): value for key, value in changes.items()}}
      )
      found.append(c)
  return found


def records(c, *splits):
  """All records of splits as the config reads them, images decoded once to see that they are there."""
  out = []
  for split in splits:
    source = data.get_source(c, split)
    out.append([source[i] for i in range(len(source))])
  return out
