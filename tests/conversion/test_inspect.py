"""tools.inspect_checkpoint on runs, converted checkpoints and PyTorch files, and on two of them."""

import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mplug_jax import config as config_lib
from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.config.presets import PRESETS
from mplug_jax.conversion import official_inventory
from mplug_jax.conversion.inspect import report, statistics
from mplug_jax.conversion.inspect import tensors as leaves_lib
from mplug_jax.conversion.inspect.statistics import Moments
from mplug_jax.tensor_files import write
from tools import inspect_checkpoint


class Adam(NamedTuple):
  count: Any
  mu: Any


def arrays():
  """Returns parameters with one number that is not finite and one bfloat16 leaf."""
  kernel = np.random.default_rng(0).normal(3.0, 2.0, (8, 16)).astype(np.float32)
  kernel[2, 5] = np.nan
  return {
    "text_encoder": {
      "layers": {"kernel": kernel, "bias": np.linspace(-1, 1, 16, dtype=ml_dtypes.bfloat16)},
      "embeddings": {"word": {"embedding": np.ones((218, 4), np.float32)}},
    },
    "itm_head": {"kernel": np.full((4, 2), 0.5, np.float32)},
  }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns a run folder with checkpoints 2 and 4, written on a mesh of four by two devices."""
  folder = tmp_path_factory.mktemp("inspect") / "run"
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
  spec = {(8, 16): P("fsdp", "tensor"), (16,): P(("fsdp", "tensor"))}
  params = jax.tree.map(
    lambda x: jax.device_put(x, NamedSharding(mesh, spec.get(x.shape, P()))), arrays()
  )
  state = {
    "step": jnp.int32(4),
    "params": params,
    "opt_state": ((), (Adam(jnp.int32(7), jax.tree.map(jnp.zeros_like, params)), None)),
    "ema_params": (),
    "extra": {"idx_queue": jnp.arange(6).reshape(1, 6)},
    "rng": jax.random.key(3),
  }
  manager = checkpoint.Manager(folder, keep=2, best_metric="accuracy")
  for step in (2, 4):
    manager.save(step, state, {"step": step, "tokenizer": "abc123"}, {"accuracy": step / 8})
  manager.close()
  config = config_lib.default_config("vqa", "tiny")
  config.batch_size = 48
  (folder / "config.json").write_text(config_lib.to_json(config))
  (folder / "tokenizer").mkdir()
  (folder / "tokenizer" / "tokenizer_config.json").write_text(
    json.dumps({"kind": "wordpiece", "fingerprint": "abc123"})
  )
  return folder


def inspect(capsys, *args, status=0):
  """Returns the printed lines."""
  assert inspect_checkpoint.main([str(arg) for arg in args]) == status
  out, err = capsys.readouterr()
  assert not err
  return out.splitlines()


def row(lines, name):
  """Returns the columns of the only line that starts with a name."""
  result = [line.split() for line in lines if line.split()[:1] == [name]]
  assert len(result) == 1, (name, result)
  return result[0][1:]


def refused(capsys, *args):
  """Returns the sentence on stderr."""
  assert inspect_checkpoint.main([str(arg) for arg in args]) == 2
  out, err = capsys.readouterr()
  assert not out, out
  assert err.startswith("error: "), err
  assert err.count("\n") == 1, err
  return err


def test_a_run_is_described_before_its_leaves(run, capsys):
  lines = inspect(capsys, run)
  assert lines[0] == f"kind            run folder {run}"
  assert lines[1] == "step            4; there are 2, 4"
  text = " ".join(" ".join(lines[: lines.index("")]).split())
  assert "accuracy=0.5" in text
  assert "wordpiece, sha256 abc123, as the checkpoint records it" in text
  assert "size tiny; other than the defaults: batch_size=48" in text
  assert text.endswith("batch_size=48")  # nothing else differs
  assert "hidden_size=32" in text
  assert "vocab_size=218" in text


def test_leaves_have_shapes_types_shardings_and_statistics(run, capsys):
  lines = inspect(capsys, run)
  tree = lines[lines.index("") + 1 :]
  kernel = arrays()["text_encoder"]["layers"]["kernel"]
  mean, std = (
    f"{x:.2e}" for x in (np.nanmean(kernel, dtype=np.float64), np.nanstd(kernel, dtype=np.float64))
  )
  assert row(tree, "params/text_encoder/layers/kernel") == [
    "8x16",
    "float32",
    "512",
    "B",
    "P(fsdp,tensor)",
    mean,
    std,
    "!!",
    "1",
  ]
  assert row(tree, "params/text_encoder/layers/bias")[:5] == [
    "16",
    "bfloat16",
    "32",
    "B",
    "P(fsdp+tensor)",
  ]
  assert row(tree, "opt_state/1/0/count") == [
    "scalar",
    "int32",
    "4",
    "B",
    "-",
    "7.00e+00",
    "0.00e+00",
    "0",
  ]
  assert row(tree, "opt_state/1/0/mu/itm_head/kernel")[:5] == ["4x2", "float32", "32", "B", "P()"]
  assert any(
    line.split()[:3] == ["rng", "2", "uint32"] for line in tree
  )  # a typed key as its numbers
  assert row(tree, "extra/idx_queue")[-3:] == ["2.50e+00", "1.71e+00", "0"]
  assert row(tree, "params/text_encoder") == ["3", "1,016", "3.9", "KiB"]
  assert row(tree, "all") == ["12", "2,058", "8.0", "KiB"]
  assert tree[-2:] == [
    "!! 1 numbers in 1 leaves are not finite:",
    "!! params/text_encoder/layers/kernel: 1",
  ]


def test_groups_selection_and_the_whole_config(run, capsys):
  lines = inspect(capsys, run, "--depth=1", "--match=^(params|rng)", "--config")
  assert row(lines, "params")[:4] == ["4", "leaves", "several", "4.0"]
  assert row(lines, "params")[-2:] == ["!!", "1"]
  assert row(lines, "all")[0] == "5"
  assert not any("opt_state" in line for line in lines)
  assert "  batch_size = 48" in lines
  assert '  optim.name = "adamw"' in lines


def test_one_checkpoint_of_a_run(run, capsys):
  assert "2; there are 2, 4" in inspect(capsys, run / "checkpoints" / "2", "--match=step")[1]
  assert "4; there are 2, 4" in inspect(capsys, run / "checkpoints", "--match=step")[1]


def test_without_values_no_number_is_read(run, monkeypatch, capsys):
  monkeypatch.setattr(
    leaves_lib.Leaves, "read", lambda self, names: pytest.fail("numbers were read")
  )
  lines = inspect(capsys, run, "--no_values")
  assert row(lines, "params/itm_head/kernel") == ["4x2", "float32", "32", "B", "P()"]
  inspect(capsys, run, run / "checkpoints" / "2", "--no_values")


@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax drops its other reads with their event loop
@pytest.mark.parametrize("damaged", ["d/*", "_METADATA"])
def test_a_damaged_checkpoint_is_refused(damaged, run, tmp_path, capsys):
  shutil.copytree(run, tmp_path / "run")
  state = tmp_path / "run" / "checkpoints" / "4" / "state"
  files = list(state.rglob(damaged))
  assert files
  for file in files:
    file.write_bytes(b"{")
  assert f"{state} cannot be read" in refused(capsys, tmp_path / "run")


def test_pytorch_files(tmp_path, capsys):
  write.save_pth(
    tmp_path / "a.pth", {"text_encoder.x": np.ones((2, 3), np.float16), "temp": np.float32(0.07)}
  )
  lines = inspect(capsys, tmp_path / "a.pth")
  assert "tensors under   model" in lines
  assert row(lines, "text_encoder.x") == ["2x3", "float16", "12", "B", "1.00e+00", "0.00e+00", "0"]
  assert row(lines, "text_encoder") == ["1", "6", "12", "B"]
  write.save_safetensors(tmp_path / "b.safetensors", {"w.x": np.arange(3)}, {"format": "pt"})
  lines = inspect(capsys, tmp_path / "b.safetensors", "--no_values")
  assert "metadata        format=pt" in lines
  assert row(lines, "w.x")[:2] == ["3", "int64"]


def test_a_converted_tree_in_a_file(tmp_path, capsys):
  path = tmp_path / "ours.safetensors"
  write.save_safetensors(
    path,
    {"params/itm_head/kernel": np.ones((4, 2), np.float32)},
    {"geometry": json.dumps({"heads": 3}), "manifest": json.dumps({"source": "official.pth"})},
  )
  lines = inspect(capsys, path)
  assert "geometry        heads=3" in lines
  assert "converted from  official.pth" in lines
  assert row(lines, "params/itm_head")[0] == "1"


WIDE = leaves_lib.Leaf((12, 768, 3072), np.dtype(ml_dtypes.bfloat16), "P(-,fsdp,tensor)")
RELEASED = official_inventory.inventory("vqa", dict(embed_dim=256, **PRESETS["large"]))


@pytest.mark.parametrize(
  "names",
  [
    {name: leaves_lib.Leaf(x.shape, np.dtype(x.dtype)) for name, x in RELEASED.items()},
    {"opt_state/mu/text_decoder/layers/crossattention_norm/scale": WIDE},
  ],
  ids=["PyTorch", "optimizer"],
)
def test_lines_of_the_released_models_fit_the_width(names, monkeypatch):
  """The longest names with the widest values."""
  monkeypatch.setattr(statistics, "moments", lambda x: Moments(10, -1e-5, 1.0))
  source = leaves_lib.Leaves("of any kind", names, lambda batch: dict.fromkeys(batch, np.zeros(())))
  assert 100 < max(map(len, report.tree(source, names))) <= report.WIDTH


def test_leaves_are_read_a_few_at_a_time(monkeypatch):
  monkeypatch.setattr(leaves_lib, "_BATCH", 100)
  names = {
    name: leaves_lib.Leaf((n,), np.dtype(np.int8))
    for name, n in {"a": 40, "b": 60, "c": 1, "d": 500, "e": 3}.items()
  }
  batches = []

  def read(batch):
    batches.append(list(batch))
    return {name: np.zeros(names[name].shape, np.int8) for name in batch}

  assert [name for name, _ in leaves_lib.Leaves("fake", names, read).read(names)] == list(names)
  assert batches == [["a", "b"], ["c"], ["d"], ["e"]]


def test_the_same_checkpoint_is_identical(run, capsys):
  lines = inspect(capsys, run, run / "checkpoints" / "2")
  assert lines[:2] == [
    f"first   run folder {run}, step 4; there are 2, 4",
    f"second  checkpoint of a run {run}/checkpoints/2, step 2; there are 2, 4",
  ]
  assert lines[3:] == [
    "12 of 12 leaves are equal; 0 only in one, 0 of another shape, 0 of another dtype, 0 of other "
    "values."
  ]


@pytest.fixture
def pair(tmp_path):
  """Writes two files with differences of every kind."""
  common = {
    "equal": np.array([1, np.nan], np.float32),
    "rounded": np.float32([1, 2]),
    "shape": np.zeros((2, 3), np.float32),
    "sign": np.float32([0.0]),
  }
  first = common | {
    "near": np.full(4, 2, np.float32),
    "far": np.full(4, 2, np.float32),
    "old.a": np.zeros(2),
    "old.b": np.zeros(3),
  }
  second = common | {
    "near": np.full(4, 2.5, np.float32),
    "far": np.full(4, 8, np.float32),
    "new": np.arange(5),
    "rounded": np.array([1, 2], ml_dtypes.bfloat16),
    "shape": np.zeros((3, 2), np.float32),
    "sign": np.float32([-0.0]),
  }
  for name, tensors in (("a", first), ("b", second)):
    write.save_safetensors(tmp_path / f"{name}.safetensors", tensors)
  return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def test_differences_are_sorted_and_counted(pair, capsys):
  lines = inspect(capsys, *pair, status=1)
  assert row(lines, "old.a") == ["2", "float64", "16", "B"]
  assert row(lines, "new") == [
    "5",
    "int64",
    "40",
    "B",
  ]
  assert row(lines, "shape") == ["2x3", "3x2"]
  assert row(lines, "far") == ["4", "float32", "6.00e+00", "3.00e+00"]
  assert row(lines, "near")[-2:] == ["5.00e-01", "2.50e-01"]
  assert row(lines, "rounded") == ["2", "float32", "->", "bfloat16", "0.00e+00", "0.00e+00"]
  assert row(lines, "sign")[-2:] == ["0.00e+00", "0.00e+00"]  # equal numbers of other bytes
  table = lines[next(i for i, line in enumerate(lines) if line.startswith("different")) :]
  assert [line.split()[0] for line in table[1:5]] == ["far", "near", "rounded", "sign"]
  assert (
    lines[-1]
    == "1 of 9 leaves are equal; 3 only in one, 1 of another shape, 1 of another dtype, 3 of "
    "other values."
  )


def test_differences_by_group_and_of_a_selection(pair, capsys):
  assert row(inspect(capsys, *pair, "--depth=1", status=1), "old") == [
    "2",
    "leaves",
    "float64",
    "40",
    "B",
  ]
  assert inspect(capsys, *pair, "--match=equal")[-1].startswith("1 of 1 leaves are equal;")
  lines = inspect(capsys, *pair, "--match=far|near", "--no_values")
  assert lines[3:] == [
    "2 of 2 leaves are equal in shape and dtype; no values were read; "
    "0 only in one, 0 of another shape, 0 of another dtype, 0 of other values."
  ]


def test_what_cannot_be_inspected_is_one_sentence(run, tmp_path, capsys):
  (tmp_path / "page.pth").write_text("<html>")
  (tmp_path / "empty").mkdir()
  (tmp_path / "half").mkdir()
  for file in ("model.json", "manifest.json"):
    (tmp_path / "half" / file).write_text("{")
  assert "no such file" in refused(capsys, tmp_path / "none")
  assert "web page" in refused(capsys, tmp_path / "page.pth")
  assert "holds no checkpoint" in refused(capsys, tmp_path / "empty")
  assert "convert the weights again" in refused(capsys, tmp_path / "half")
  assert "page.pth" in refused(capsys, run, tmp_path / "page.pth")
  assert "not a regular expression" in refused(capsys, run, "--match=(")
  assert "selects none of 12 leaves" in refused(capsys, run, "--match=nothing")


def test_pytorch_weights_tell_their_geometry(tmp_path, capsys):
  g = dict(PRESETS["tiny"], embed_dim=32, vocab_size=50, image_size=64)
  tensors = official_inventory.inventory(
    "vqa", g, official_inventory.ClipText(8, 1, 8, 5, 11), stored_fusion_layers=2
  )
  write.save_safetensors(
    tmp_path / "x.safetensors", {name: np.zeros(x.shape, x.dtype) for name, x in tensors.items()}
  )
  text = " ".join(inspect(capsys, tmp_path / "x.safetensors", "--no_values")[:5])
  assert all(
    f" {field}={g[field]}," in text
    for field in ("image_size", "vision_layers", "vocab_size", "mlp_dim", "fusion_layers")
  )
