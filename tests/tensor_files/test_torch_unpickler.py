"""Tensors of a checkpoint's pickle, in every way that PyTorch describes them."""

import zipfile

import numpy as np
import pytest

from mplug_jax.tensor_files import torch_unpickler
from mplug_jax.tensor_files.open import open_tensors
from tests.support.torch_pickles import (
  Op,
  archive,
  build,
  call,
  floats,
  name,
  new,
  op,
  refused,
  same,
  storage,
  tensor,
  text_only,
)


def test_views_of_one_storage(tmp_path):
  data = np.arange(24, dtype=np.float32)
  values = {
    "whole": tensor("0", (4, 6)),
    "transposed": tensor("0", (6, 4), (1, 6)),
    "row": tensor("0", (6,), (1,), 12, 24),
    "column": tensor("0", (4,), (6,), 5, 24),
    "grid": tensor("0", (2, 3), (12, 2), 1, 24),
    "expanded": tensor("0", (3, 6), (0, 1), 6, 24),
    "one": tensor("0", (), (), 23, 24),
    "axes": tensor("0", (1, 6, 1), (99, 1, 7), 0, 24),
    "tied": tensor("0", (4, 6)),
  }
  matrix = data.reshape(4, 6)
  expected = {
    "whole": matrix,
    "transposed": matrix.T,
    "row": matrix[2],
    "column": matrix[:, 5],
    "grid": matrix[::2, 1::2],
    "expanded": np.tile(matrix[1], (3, 1)),
    "one": data[23].reshape(()),
    "axes": data[:6].reshape(1, 6, 1),
    "tied": matrix,
  }
  for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    with open_tensors(archive(tmp_path / "file", values, {"0": data}, compression)) as file:
      assert list(file) == list(values)
      for key, array in expected.items():
        same(file[key], np.ascontiguousarray(array).reshape(array.shape))


def test_every_way_a_tensor_is_rebuilt(tmp_path):
  x = floats(2, 3)
  plain = tensor("0", (2, 3))
  hooks = call("collections.OrderedDict")
  untyped = call(
    "torch._utils._rebuild_tensor_v3",
    storage("0", 24, "torch.storage.UntypedStorage"),
    0,
    (2, 3),
    (3, 1),
    False,
    hooks,
    name("torch.float32"),
    op({}),
  )
  values = {
    "old": call("torch._utils._rebuild_tensor", storage("0", 6), 0, (2, 3), (3, 1)),
    "parameter": call("torch._utils._rebuild_parameter", plain, True, hooks),
    "with_state": call(
      "torch._utils._rebuild_parameter_with_state", plain, True, hooks, {"tag": 1}
    ),
    "with_attributes": call(
      "torch._tensor._rebuild_from_type_v2",
      name("torch._utils._rebuild_tensor_v2"),
      name("torch.nn.parameter.Parameter"),
      Op(plain[len(name("torch._utils._rebuild_tensor_v2")) : -1]),
      {},
    ),
    "untyped": untyped,
    "size": call(
      "torch._utils._rebuild_tensor_v2",
      storage("0", 6),
      0,
      call("torch.Size", (2, 3)),
      (3, 1),
      False,
      hooks,
    ),
  }
  # The state dict's own attribute, as PyTorch writes it, and one that would hide a method.
  state = build(
    Op(call("collections.OrderedDict") + op(values)[1:]), {"_metadata": {}, "items": 3, "values": 4}
  )
  with open_tensors(archive(tmp_path / "file", {"model": state}, {"0": x})) as file:
    assert list(file) == list(values)
    for key in file:
      same(file[key], x)
    assert file.placeholders == {"torch.nn.parameter.Parameter": 1}


def test_bfloat16_and_bool_storages(tmp_path):
  values = {
    "b": tensor("0", (2,), kind="torch.BFloat16Storage"),
    "m": tensor("1", (2,), kind="torch.BoolStorage"),
  }
  with open_tensors(
    archive(tmp_path / "file", values, {"0": b"\x80\x3f\xc0\xff", "1": b"\0\1"})
  ) as file:
    assert file["b"][0] == 1
    assert np.isnan(file["b"][1])
    assert file["b"].tobytes() == b"\x80\x3f\xc0\xff"
    assert file["m"].tolist() == [False, True]


@pytest.mark.parametrize(
  ("wrap", "wrapper"),
  [
    (lambda x: x, ""),
    (lambda x: {"model": x, "optimizer": {"model": 1}, "epoch": 3}, "model"),
    (lambda x: {"module": x}, "module"),
    (lambda x: {"state_dict": x, "model": "ViT-B/16"}, "state_dict"),
    (lambda x: {"module": {"v": tensor("0", (3,))}, "model": x}, "model"),
    (lambda x: {"model": {"width": 3}, "state_dict": x}, "state_dict"),
    (lambda x: {"model": {"module": x}}, "model/module"),
  ],
)
def test_wrappers(wrap, wrapper, tmp_path):
  state = {
    "w": tensor("0", (3,)),
    "epoch": 4,
    "nested": {"v": tensor("0", (3,))},
    7: tensor("0", (3,)),
    "args": call("argparse.Namespace"),
  }
  with open_tensors(archive(tmp_path / "file", wrap(state), {"0": floats(3)})) as file:
    assert list(file) == ["w"]
    assert file.wrapper == wrapper
    assert file.ignored == {
      "epoch": "int",
      "nested": "dict",
      "<int>": "tensor",
      "args": "argparse.Namespace",
    }
    assert file.placeholders == {"argparse.Namespace": 1}


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ({}, "an empty dictionary"),
    ({"model": {"a": 1}, "epoch": 2.5}, "a dictionary with 'model': dict, 'epoch': float"),
    ([1], "a list"),
    (new("my.Model", {"training": True}), "an object of my.Model"),
    ({"a\nb": 1}, r"'a\nb': int"),
    (Op(b"\x8c\x04evilX\x05\x00\x00\x00na\nme\x93)R"), r"an object of evil.na\nme"),
    (tensor("0", (1,)), "a tensor"),
    ({str(i): i for i in range(20)}, "'7': int, and 12 more"),
  ],
  ids=text_only,
)
def test_a_file_without_state_dict_says_what_it_has(value, message, tmp_path):
  refused(
    lambda: open_tensors(archive(tmp_path / "file", value, {"0": floats(1)})),
    str(tmp_path / "file"),
    "no state dict",
    message,
  )


def test_torchscript_modules_become_names(tmp_path):
  def module(kind, **attributes):
    return new(f"__torch__.clip.{kind}", attributes)

  x = floats(2, 2)
  y = floats(3).astype(np.float16)
  half = tensor("1", (3,), kind="torch.HalfStorage")
  root = module(
    "Clip",
    training=True,
    visual=module(
      "Visual",
      conv1=module("Conv", weight=tensor("0", (2, 2)), bias=None),
      proj=half,
      blocks=module("List", **{"0": module("Block", w=half), "1": module("Block", w=half)}),
    ),
    sizes=call("torch.jit._pickle.restore_type_tag", [1, 2], "List[int]"),
    logit_scale=half,
  )
  file = open_tensors(
    archive(tmp_path / "clip.pt", root, {"0": x, "1": y}, **{"constants.pkl": b"\x80\x02)."})
  )
  assert list(file) == [
    "visual.conv1.weight",
    "visual.proj",
    "visual.blocks.0.w",
    "visual.blocks.1.w",
    "logit_scale",
  ]
  same(file["visual.conv1.weight"], x)
  same(file["visual.blocks.1.w"], y)
  assert file.ignored == {
    "training": "bool",
    "visual.conv1.bias": "NoneType",
    "sizes": "torch.jit._pickle.restore_type_tag",
  }
  assert file.placeholders["__torch__.clip.Block"] == 2
  assert file.wrapper == ""


def test_module_trees_without_end_are_refused(tmp_path, monkeypatch):
  cycle = Op(name("a.B") + b")\x81q\x00}(" + op("self") + b"h\x00ub")
  refused(lambda: open_tensors(archive(tmp_path / "cycle", cycle)), "contain themselves")
  # Each of 40 modules holds the next one twice: 2 ** 40 names.
  modules = b"".join(name("a.B") + b")\x81q" + bytes([i]) + b"0" for i in range(40))
  again = [Op(b"h" + bytes([i])) for i in range(40)]
  links = b"".join(
    build(again[i], {"a": again[i + 1], "b": again[i + 1]}) + b"0" for i in range(39)
  )
  monkeypatch.setattr(torch_unpickler, "_MAX_NODES", 1000)
  refused(
    lambda: open_tensors(archive(tmp_path / "bomb", Op(modules + links + again[0]))),
    "contain themselves",
  )


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (
      call("torch._utils._rebuild_parameter", call("my.Tensor"), True, {}),
      "an object of my.Tensor",
    ),
    (
      call("torch._utils._rebuild_tensor_v2", call("my.storage"), 0, (3,), (1,)),
      "an object of my.storage",
    ),
    (
      call("torch._utils._rebuild_tensor_v2", storage("0", 3, "my.Storage"), 0, (3,), (1,)),
      "the name my.Storage",
    ),
    (
      call("torch._utils._rebuild_tensor_v2", storage("0", 3), 0, call("my.Shape"), (1,)),
      "shape is an object of my.Shape",
    ),
    (call("torch._utils._rebuild_tensor_v2", storage("0", 3), 0, (-3,), (1,)), "whole numbers"),
    (call("torch._utils._rebuild_tensor_v2", storage("0", 3), 0, (True,), (1,)), "whole numbers"),
    (call("torch._utils._rebuild_tensor_v2", storage("0", 3), 0, (3,), (1, 1)), "whole numbers"),
    (
      call(
        "torch._utils._rebuild_tensor_v2", storage("0", 12, "torch.UntypedStorage"), 0, (3,), (1,)
      ),
      "untyped",
    ),
    (
      call("torch._tensor._rebuild_from_type_v2", name("my.function"), name("my.Tensor"), (1,), {}),
      "made by the name my.function",
    ),
    (call("torch._utils._rebuild_qtensor", storage("0", 3)), "quantized"),
    (
      call(
        "torch._utils._rebuild_tensor_v2", storage("0", 3), 0, (3,), (1,), False, {}, {"neg": True}
      ),
      "negated",
    ),
    (tensor("0", (1 << 40,), (0,), numel=3), "far larger than its storage"),
    (tensor("0", (1,) * 65, numel=3), "far larger"),
    (tensor("0", (0, 1 << 61), (1, 1), numel=3), "far larger"),
    (tensor("0", (4,), numel=3), "beyond its storage"),
    (tensor("0", (3,), offset=1), "beyond its storage"),
    (tensor("0", (2, 2), (2, 1), numel=3), "beyond its storage"),
    (tensor("7", (3,)), "data/7 is missing"),
    (tensor("0", (4,)), "has 12 bytes and should have 16"),
    (tensor("../version", (1,)), "is missing"),
  ],
  ids=text_only,
)
def test_a_tensor_that_cannot_be_rebuilt_is_named(value, message, tmp_path):
  path = archive(
    tmp_path / "file", {"model": {"a.w": value, "ok": tensor("0", (3,))}}, {"0": floats(3)}
  )
  refused(lambda: open_tensors(path), str(path), message, "tensor 'a.w'")


def test_byte_strings_of_python_2():
  """Strings of protocol 0 that are not ASCII, which Python's pickletools cannot read."""
  assert torch_unpickler.load(b"S'caf\\xc3\\xa9'\np0\n.", "a.p") == ("caf\xc3\xa9", {})
  assert torch_unpickler.load(b"S'a\xe9'\np0\n.", "a.p") == ("a\xe9", {})
  for data in (b"S'\\xc3'\np99999999999\n.", b"S'\\xc3'\np0\n", b"S'\\xc3'\n\xff."):
    with pytest.raises(
      ValueError, match="a.p: its pickle cannot be read .* damaged or not a list of refs"
    ):
      torch_unpickler.load(data, "a.p", kind="list of refs")
