"""Code in a checkpoint's pickle is not executed."""

import pickle
import zipfile

import pytest

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
  program,
  refused,
  same,
  tensor,
)


def attacks(path):
  """Returns {title: (program, whether Python's unpickler runs it)}; all try to make a folder."""
  mkdir = name("os.mkdir")
  text = op(path)
  source = f"__import__('os').mkdir({path!r})"
  return {
    "reduce": (program(call("os.mkdir", path)), True),
    "eval": (program(call("builtins.eval", source)), True),
    "eval, old name": (program(call("__builtin__.eval", source)), True),
    "getattr": (
      program(call(call("builtins.getattr", call("importlib.import_module", "os"), "mkdir"), path)),
      True,
    ),
    "nested": (
      program({"model": [call("builtins.list", call("builtins.map", mkdir, [path]))]}),
      True,
    ),
    "in a tensor": (
      program(
        {"model": {"w": call("torch._utils._rebuild_parameter", call("os.mkdir", path), True, {})}}
      ),
      False,
    ),
    "from type": (
      program({"w": call("torch._tensor._rebuild_from_type_v2", mkdir, mkdir, (path,), {})}),
      False,
    ),
    "new object": (program(Op(name("functools.partial") + op((mkdir, path)) + b"\x81)R")), True),
    "instance": (b"(" + text + b"ios\nmkdir\n.", True),
    "object": (b"(" + mkdir + text + b"o.", True),
    "stack global": (b"\x80\x04" + op("os") + op("mkdir") + b"\x93" + text + b"\x85R.", True),
    "dotted name": (
      b"\x80\x04"
      + op("pathlib")
      + op("Path.mkdir")
      + b"\x93"
      + call("pathlib.Path", path)
      + b"\x85R.",
      True,
    ),
    "state": (
      program(
        build(
          call("collections.OrderedDict"),
          {"__class__": mkdir, "__reduce__": call("os.mkdir", path)},
        )
      ),
      True,
    ),
    "append": (
      program(Op(call("collections.deque", [], 1) + b"(" + call("os.mkdir", path) + b"e")),
      True,
    ),
    "persistent": (
      program(Op(op(("storage", call("os.mkdir", path), "0", "cpu", 1)) + b"Q")),
      False,
    ),
  }


@pytest.mark.parametrize("title", attacks("x"))
def test_code_in_a_pickle_does_not_run(title, tmp_path):
  marker = tmp_path / "ran"
  data, dangerous = attacks(str(marker))[title]
  if dangerous:  # the attack works where nothing stops it
    pickle.loads(data)
    marker.rmdir()
  with zipfile.ZipFile(tmp_path / "file", "w") as file:
    file.writestr("archive/data.pkl", data)
  with pytest.raises(ValueError, match="file"):
    open_tensors(tmp_path / "file")
  assert not marker.exists()


def test_code_beside_the_tensors_is_counted_and_not_run(tmp_path):
  marker = tmp_path / "ran"
  mkdir = call("os.mkdir", str(marker))
  value = {
    "model": {"w": tensor("0", (3,))},
    "args": mkdir,
    "more": [mkdir, name("os.remove")],
    "object": Op(
      new("my.List", {"a": 1}) + b"(" + op(1) + op(2) + b"e(" + op("k") + op("v") + b"u"
    ),
    "bad": call("torch._utils._rebuild_tensor_v2", 1, 2, 3, 4),
    "no record": tensor("9", (5,)),
  }
  with open_tensors(archive(tmp_path / "file", value, {"0": floats(3)})) as file:
    same(file["w"], floats(3))
    assert file.placeholders == {"os.mkdir": 2, "os.remove": 1, "my.List": 1}
  assert not marker.exists()


@pytest.mark.parametrize(
  "target",
  [
    "torch._utils._rebuild_tensor_v2",
    "torch.FloatStorage",
    "torch.float32",
    "collections.OrderedDict",
  ],
)
@pytest.mark.parametrize(
  "state", [{"dtype": 1, "_function": 2}, (None, {"__call__": 3, "dtype": 4, "__setitem__": 5})]
)
def test_a_pickle_cannot_change_what_it_names(target, state, tmp_path):
  good = archive(tmp_path / "good", {"w": tensor("0", (3,))}, {"0": floats(3)})
  refused(
    lambda: open_tensors(archive(tmp_path / "file", build(name(target), state))),
    "pickle cannot be read",
  )
  same(open_tensors(good)["w"], floats(3))
