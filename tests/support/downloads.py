"""Small downloads of data sets in the distributed layout; helpers to prepare and read them."""

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


def picture(seed=0):
  """Returns the encoded bytes of a small image."""
  file = io.BytesIO()
  Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)).save(
    file, "PNG"
  )
  return file.getvalue()


def write(folder, values):
  """Writes files below a folder: {name: bytes, text, or a value that is written as JSON}."""
  for name, value in values.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_bytes(value))


def write_zip(path, values):
  """Writes a zip file; values as in `write`."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    for name, value in values.items():
      file.writestr(name, _bytes(value))


def _bytes(value):
  if isinstance(value, bytes):
    return value
  return (value if isinstance(value, str) else json.dumps(value)).encode()


def write_clips(folder, *names):
  """Writes clips of four frames."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    video.write_mp4(
      folder / name, np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    )


def lines(rows):
  """Returns rows as JSON lines."""
  return "".join(json.dumps(row) + "\n" for row in rows)


def read(path):
  """Returns the entries of a written file."""
  return (
    [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".jsonl"
    else json.loads(path.read_text())
  )


def _tool(name, root, *options):
  """Returns (exit status, stdout, stderr) of the tool."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = prepare_data.main([name, f"--root={root}", *map(str, options)])
  return status, out.getvalue(), err.getvalue()


def prepare(name, root, *options):
  """Runs the tool, which must succeed; returns the lines that it printed."""
  status, printed, err = _tool(name, root, *options)
  assert (status, err) == (0, ""), err
  return printed.splitlines()


def refused(name, root, *messages, options=()):
  """Runs the tool, which must fail with one line that has the messages, and change no file."""
  before = _files(root)
  status, printed, err = _tool(name, root, *options)
  assert (status, printed) == (1, "")
  assert err.startswith("error: "), err
  assert err.count("\n") == 1, err
  for message in messages:
    assert message in err, err
  assert _files(root) == before


def run(config, workdir):
  """Trains in this process; returns the last line that it printed."""
  with contextlib.redirect_stdout(io.StringIO()) as out:
    assert loop.train(config, str(workdir)) == 0
  return out.getvalue().splitlines()[-1]


def _files(root):
  return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def configs(printed, **changes):
  """Returns the tiny configs of the printed commands, with changes section__field=value."""
  tiny = []
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
      tiny.append(c)
  return tiny


def records(c, *splits):
  """Returns all records of splits as the config reads them."""
  out = []
  for split in splits:
    source = data.get_source(c, split)
    out.append([source[i] for i in range(len(source))])
  return out
