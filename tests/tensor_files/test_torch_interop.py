"""PyTorch and the safetensors library read what we write, and we read what they write."""

import io
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mplug_jax.tensor_files.open import open_tensors
from mplug_jax.tensor_files.write import Tensor, save_pth, save_safetensors
from tests.support.torch_pickles import ARRAYS, floats, same


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


def state_of(torch):
  """Returns arrays, and the state dict of a module with all that makes PyTorch's pickles differ."""
  table = floats(6, 4)
  module = torch.nn.Module()
  module.linear = torch.nn.Linear(4, 3)
  module.word = torch.nn.Parameter(torch.tensor(table))
  module.head = module.word
  module.register_buffer("ids", torch.arange(7).expand(1, -1))
  module.fp16, module.bf16 = (
    torch.nn.Parameter(torch.randn(2, 3).to(x)) for x in (torch.float16, torch.bfloat16)
  )
  module.register_buffer("transposed", torch.tensor(floats(5, 2)).T)
  module.register_buffer("part", torch.arange(10.0)[3:7:2])
  module.register_buffer("flag", torch.tensor(True))
  module.register_buffer("none", torch.zeros(0, 3))
  state = module.state_dict(keep_vars=True)  # parameters as such, not their data
  return state, {key: torch_array(torch, x) for key, x in state.items()}


def torch_array(torch, x):
  if x.dtype == torch.bfloat16:
    return x.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return np.ascontiguousarray(x.detach().numpy()).reshape(x.shape)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", ["", "model"])
def test_files_by_torch_save(torch, legacy, wrapper, tmp_path):
  state, arrays = state_of(torch)
  optimizer = {"state": {0: torch.zeros(3)}, "param_groups": [{"lr": 0.1}]}
  torch.save(
    {wrapper: state, "optimizer": optimizer, "epoch": 3} if wrapper else state,
    tmp_path / "file",
    _use_new_zipfile_serialization=not legacy,
  )
  with open_tensors(tmp_path / "file") as file:
    assert list(file) == list(arrays)
    assert file.wrapper == wrapper
    assert not file.placeholders
    for key, array in arrays.items():
      same(file[key], array)
      assert (file.shape(key), file.dtype(key)) == (array.shape, array.dtype)
      assert file[key].flags.writeable


def test_a_legacy_file_with_code(torch, tmp_path):
  class Attack:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "ran"),)

  torch.save(
    {"model": {"w": torch.zeros(3)}, "args": Attack()},
    tmp_path / "file",
    _use_new_zipfile_serialization=False,
  )
  with pytest.raises(ValueError, match="before PyTorch 1.6"):
    open_tensors(tmp_path / "file")
  assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive(torch, tmp_path):
  class Block(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.norm = torch.nn.LayerNorm(4)
      self.width = 4
      self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4).half() for _ in range(2)])
      self.scale = torch.nn.Parameter(torch.tensor(2.0))
      self.register_buffer("size", torch.tensor(224))

    def forward(self, x):
      return self.norm(x) * self.scale

  block = Block()
  torch.jit.save(torch.jit.trace(block, torch.ones(1, 4)), tmp_path / "traced.pt")
  torch.jit.save(torch.jit.script(block), tmp_path / "scripted.pt")
  for path in tmp_path.iterdir():
    with open_tensors(path) as file:
      assert set(file) == set(block.state_dict())
      for key, x in block.state_dict().items():
        same(file[key], torch_array(torch, x))
      assert sum(file.placeholders.values()) >= 4


def test_a_pickle_with_objects_of_a_framework(torch, tmp_path):
  class Settings:
    pass

  settings = Settings()
  settings.scale = np.float64(3)
  Settings.__qualname__ = "Settings"
  Settings.__module__ = __name__
  globals()["Settings"] = Settings
  try:
    torch.save(
      {
        "module": {"w": torch.ones(3)},
        "args": settings,
        "rng": torch.get_rng_state(),
        "numpy": np.ones(3),
        "lr": torch.float32,
        "device": torch.device("cpu"),
        "size": torch.Size([2]),
      },
      tmp_path / "file",
    )
  finally:
    del globals()["Settings"]
  with open_tensors(tmp_path / "file") as file:
    same(file["w"], np.ones(3, np.float32))
    assert file.placeholders[f"{__name__}.Settings"] == 1
    assert any("numpy" in key for key in file.placeholders)


@pytest.mark.parametrize("limit", [None, 200])
def test_torch_loads_what_we_write(torch, limit, tmp_path, monkeypatch):
  if limit:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
  tied = [Tensor("tied", ARRAYS["a.weight"].shape, np.float32, same_as="a.weight")]
  tensors = [Tensor(key, x.shape, x.dtype, lambda x=x: x) for key, x in ARRAYS.items()] + tied
  save_pth(tmp_path / "file", tensors)
  for mmap in (False, True):
    state = torch.load(tmp_path / "file", weights_only=True, mmap=mmap)["model"]
    assert list(state) == [*ARRAYS, "tied"]
    for key, array in ARRAYS.items():
      assert state[key].stride() == torch.zeros(array.shape).stride()
      same(torch_array(torch, state[key]), np.ascontiguousarray(array).reshape(array.shape))
    assert state["tied"].data_ptr() == state["a.weight"].data_ptr()
  buffer = io.BytesIO()
  torch.save(state, buffer)  # what PyTorch makes of it is a state dict like any other


def test_safetensors_files_of_the_library(tmp_path):
  library = pytest.importorskip("safetensors.numpy")
  arrays = {key: np.ascontiguousarray(x).reshape(x.shape) for key, x in ARRAYS.items()}
  plain = {key: x for key, x in arrays.items() if x.dtype != ml_dtypes.bfloat16}
  library.save_file(plain, tmp_path / "theirs", {"format": "np"})
  save_safetensors(tmp_path / "ours", plain, {"format": "np"})
  with open_tensors(tmp_path / "theirs") as file:
    assert file.metadata == {"format": "np"}
    assert set(file) == set(plain)
    for key, array in plain.items():
      same(file[key], array)
  for key, array in library.load_file(tmp_path / "ours").items():
    same(array, plain[key])


def test_safetensors_of_pytorch(torch, tmp_path):
  library = pytest.importorskip("safetensors.torch")
  save_safetensors(tmp_path / "ours", ARRAYS)
  state = library.load_file(tmp_path / "ours")
  assert set(state) == set(ARRAYS)
  for key, x in state.items():
    same(torch_array(torch, x), np.ascontiguousarray(ARRAYS[key]).reshape(ARRAYS[key].shape))
  library.save_file(state, tmp_path / "theirs")
  with open_tensors(tmp_path / "theirs") as file:
    for key, x in state.items():
      same(file[key], torch_array(torch, x))
