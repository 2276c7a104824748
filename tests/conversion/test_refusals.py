"""Failed conversions and exports: one sentence on stderr, exit status 1, an unchanged folder."""

import contextlib
import pickle
import resource
import subprocess
import sys

import numpy as np
import pytest

from mplug_jax.tensor_files import write as torch_write
from tests.conversion.test_forms import in_instructions
from tests.support.command_errors import one_sentence, refused, refused_conversion, snapshot
from tests.support.official_state import state_dict
from tests.support.torch_pickles import archive, call
from tools import convert_checkpoint, export_torch

FLAGS = ("--heads=2", "--fusion_layers=2", "--stride=1")
DESTS = ("ours", "ours.safetensors")
KEY = "text_decoder.bert.encoder.layer.1.intermediate.dense.weight"


@pytest.fixture(scope="module")
def tensors():
  return state_dict("caption")


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory):
  """Returns {suffix: bytes of a complete file}, all with the same tensors."""
  folder = tmp_path_factory.mktemp("whole")
  torch_write.save_pth(folder / "x.pth", tensors)
  torch_write.save_safetensors(folder / "x.safetensors", tensors)
  return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def ours(files, tmp_path_factory):
  """A converted checkpoint, as a folder and as one file."""
  folder = tmp_path_factory.mktemp("converted")
  (folder / "x.pth").write_bytes(files[".pth"])
  for dest in DESTS:
    assert convert_checkpoint.main([str(folder / "x.pth"), str(folder / dest), *FLAGS]) == 0
  return folder


@pytest.mark.parametrize("dest", DESTS)
@pytest.mark.parametrize(
  ("change", "messages"),
  [
    (
      lambda x: {key: array for key, array in x.items() if key != KEY},
      ("1 leaves missing", "text_decoder/layers/intermediate"),
    ),
    (
      lambda x: {f"{key}s" if key == KEY else key: array for key, array in x.items()},
      ("1 unknown tensors", "1 leaves missing"),
    ),
    (
      lambda x: x | {KEY: x[KEY][:, :-1]},
      ("1 tensors of another shape", "text_decoder.bert.encoder"),
    ),
    (lambda x: x | {KEY: x[KEY].reshape(-1)}, ("1 tensors of another shape",)),
    (
      lambda x: x | {"classifier.weight": np.zeros((2, 2), np.float32)},
      ("1 unknown tensors: classifier.weight",),
    ),
    (lambda x: x | {f"module.{KEY}": x[KEY]}, ("have two names", f"module.{KEY}")),
    (lambda x: {"weight": np.zeros((3, 4), np.float32)}, ("fit no known format",)),
  ],
  ids=["dropped", "renamed", "narrower", "flat", "unknown", "twice", "of something else"],
)
def test_tensors_that_do_not_fit(change, messages, dest, tensors, tmp_path, capsys):
  torch_write.save_pth(tmp_path / "x.pth", change(tensors))
  refused_conversion(capsys, tmp_path, dest, FLAGS, messages)


@pytest.mark.parametrize(
  ("flags", "messages"),
  [
    (("--fusion_layers=5", "--stride=1", "--heads=2"), ("leaves missing", "fusion_encoder")),
    (("--fusion_layers=2", "--stride=2", "--heads=2"), ("leaves missing", "crossattention")),
    (("--fusion_layers=2", "--stride=1", "--heads=3"), ("heads",)),
    ((*FLAGS, "--image_size=20"), ("--image_size=20", "patch size 8")),
  ],
  ids=["fusion layers", "stride", "heads", "image size"],
)
def test_flags_of_another_geometry(flags, messages, tensors, tmp_path, capsys):
  # Connected layers have no cross-attention: without it this is the checkpoint of a model that
  # connects its first layer.
  stored = {
    key: x
    for key, x in tensors.items()
    if "fusion_encoder.encoder.layer.2.crossattention" not in key
  }
  torch_write.save_pth(tmp_path / "x.pth", stored if "--stride=2" in flags else tensors)
  refused_conversion(capsys, tmp_path, "ours", flags, messages)


@pytest.mark.parametrize(
  ("suffix", "at"),
  [
    (".pth", 100),
    (".pth", 0.5),
    (".pth", 0.9),
    (".pth", -300),
    (".pth", -10),
    (".safetensors", 6),
    (".safetensors", 500),
    (".safetensors", 0.5),
    (".safetensors", -1),
  ],
  ids=[
    "zip's first record",
    "zip's half",
    "zip's tensor",
    "zip directory",
    "zip's last bytes",
    "safetensors' length",
    "safetensors' header",
    "safetensors' tensor",
    "safetensors' last byte",
  ],
)
def test_truncated_files(suffix, at, files, tmp_path, capsys):
  path = tmp_path / f"x{suffix}"
  complete = files[suffix]
  path.write_bytes(complete[: int(at * len(complete)) if isinstance(at, float) else at])
  refused(
    capsys,
    tmp_path,
    convert_checkpoint.main,
    path,
    tmp_path / "ours",
    *FLAGS,
    messages=(str(path),),
  )


OTHERS = {
  "web page": (b"<!DOCTYPE html><html>not found</html>", "a web page"),
  "Git LFS pointer": (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "git lfs pull",
  ),
  "empty file": (b"", "an empty file"),
  "text": (b"hello, world", "not a PyTorch checkpoint"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_sources_that_are_no_checkpoint(what, tmp_path, capsys):
  content, message = OTHERS[what]
  path = tmp_path / "download.pth"
  path.write_bytes(content)
  refused(
    capsys,
    tmp_path,
    convert_checkpoint.main,
    path,
    tmp_path / "ours",
    messages=(str(path), message),
  )


def test_folders_and_paths_without_a_checkpoint(tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  (tmp_path / "empty" / "readme.txt").write_text("weights come later")
  refused(
    capsys,
    tmp_path,
    convert_checkpoint.main,
    tmp_path / "empty",
    tmp_path / "ours",
    messages=("none of model.safetensors",),
  )
  refused(
    capsys,
    tmp_path,
    convert_checkpoint.main,
    tmp_path / "gone.pth",
    tmp_path / "ours",
    messages=("no such file",),
  )
  refused(
    capsys,
    tmp_path,
    export_torch.main,
    tmp_path / "empty",
    tmp_path / "back.pth",
    messages=(str(tmp_path / "empty"),),
  )
  refused(
    capsys,
    tmp_path,
    export_torch.main,
    tmp_path / "gone",
    tmp_path / "back.pth",
    messages=(str(tmp_path / "gone"),),
  )


# ---- files with code in them


class Runs:
  """Unpickled, it calls a function."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def plain_pickle(path, ran):
  path.write_bytes(pickle.dumps({"model": Runs(eval, f"open({str(ran)!r}, 'w')")}, 2))


def test_code_in_a_file_is_not_run(tensors, tmp_path, capsys):
  """As the complete file, in place of a tensor, and in a pickle of Python."""
  path = tmp_path / "evil.pth"
  ran = tmp_path / "ran"
  module, records = in_instructions(tensors)
  evil = {KEY: call("builtins.eval", f"open({str(ran)!r}, 'w')")}
  for write, message in (
    (lambda: archive(path, call("os.system", f"touch {ran}")), "an object of os.system"),
    (lambda: archive(path, {"model": module | evil}, records), "1 leaves missing"),
    (lambda: plain_pickle(path, ran), "a pickle that torch.save did not write"),
  ):
    write()
    refused(
      capsys,
      tmp_path,
      convert_checkpoint.main,
      path,
      tmp_path / "ours",
      *FLAGS,
      messages=(message,),
    )
    assert not ran.exists()


def test_the_code_would_have_run(tmp_path):
  """Python's unpickler runs it, so the previous test can fail."""
  plain_pickle(tmp_path / "evil.pth", tmp_path / "ran")
  pickle.loads((tmp_path / "evil.pth").read_bytes())
  assert (tmp_path / "ran").exists()


# ---- destinations


@pytest.mark.parametrize("dest", DESTS)
def test_an_existing_destination_is_left_as_it_is(dest, files, tmp_path, capsys):
  (tmp_path / "x.pth").write_bytes(files[".pth"])
  (tmp_path / "ours").mkdir()
  (tmp_path / "ours" / "mine.txt").write_text("keep")
  (tmp_path / "ours.safetensors").write_text("keep")
  refused_conversion(capsys, tmp_path, dest, FLAGS, (f"{dest} exists already",))


@pytest.mark.parametrize("source", DESTS)
def test_a_failed_export_leaves_the_older_one(source, ours, tmp_path, capsys):
  (tmp_path / "back.pth").write_text("an older export")
  refused(
    capsys,
    tmp_path,
    export_torch.main,
    ours / source,
    tmp_path / "back.pth",
    "--task=retrieval",
    messages=("the official retrieval model needs", "--task"),
  )


def test_an_export_replaces_an_export_and_nothing_else(ours, tmp_path, capsys):
  arguments = (ours / "ours.safetensors", tmp_path / "back.pth")
  (tmp_path / "back.pth").write_text("the original weights")
  messages = ("back.pth exists", "--overwrite")
  refused(capsys, tmp_path, export_torch.main, *arguments, messages=messages)
  command = [*map(str, arguments), "--slim"]
  assert export_torch.main([*command, "--overwrite"]) == 0
  assert export_torch.main(command) == 0


def test_damaged_checkpoints_are_not_exported(ours, tmp_path, capsys):
  complete = (ours / "ours.safetensors").read_bytes()
  (tmp_path / "ours.safetensors").write_bytes(complete[:-1])
  (tmp_path / "ours").mkdir()
  for file in ("model.json", "manifest.json"):
    (tmp_path / "ours" / file).write_bytes((ours / "ours" / file).read_bytes())  # and no state
  for source in DESTS:
    refused(
      capsys,
      tmp_path,
      export_torch.main,
      tmp_path / source,
      tmp_path / "back.pth",
      messages=(str(tmp_path / source),),
    )


@contextlib.contextmanager
def file_size_limit(nbytes):
  """Makes writing beyond a number of bytes fail as on a full disk.

  Python ignores the signal that comes with it.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [1_000, 100_000])
def test_a_full_disk_stops_a_conversion_to_one_file(nbytes, files, tmp_path, capsys):
  (tmp_path / "x.pth").write_bytes(files[".pth"])
  with file_size_limit(nbytes):
    refused(
      capsys,
      tmp_path,
      convert_checkpoint.main,
      tmp_path / "x.pth",
      tmp_path / "ours.safetensors",
      *FLAGS,
      messages=("File too large", str(tmp_path / "ours.safetensors")),
    )


@pytest.mark.parametrize("source", DESTS)
@pytest.mark.parametrize("dest", ["back.pth", "back.safetensors"])
@pytest.mark.parametrize("nbytes", [1_000, 500_000])
def test_a_full_disk_stops_an_export(nbytes, dest, source, ours, tmp_path, capsys):
  for name in (dest, f"{dest}.manifest.json"):
    (tmp_path / name).write_text("of an older export")
  with file_size_limit(nbytes):
    refused(
      capsys,
      tmp_path,
      export_torch.main,
      ours / source,
      tmp_path / dest,
      messages=("File too large", str(tmp_path / dest)),
    )


def test_a_full_disk_stops_a_conversion_to_a_folder(files, tmp_path):
  """In a process, because the messages of Orbax's remaining threads come at its end."""
  (tmp_path / "x.pth").write_bytes(files[".pth"])
  before = snapshot(tmp_path)
  command = [
    sys.executable,
    "-m",
    "tools.convert_checkpoint",
    str(tmp_path / "x.pth"),
    str(tmp_path / "ours"),
    *FLAGS,
  ]
  with file_size_limit(100_000):  # which the process inherits
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert result.returncode == 1
  assert not result.stdout
  one_sentence(result.stderr, "File too large", str(tmp_path / "ours"))
  assert snapshot(tmp_path) == before
