"""Handmade checkpoints, one for each pickle construct; no PyTorch needed."""

import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest


class Op(bytes):
  """Instructions that leave one value on the stack."""


def op(value):
  """A Python value, or one already in instructions -> instructions (protocol 2)."""
  if isinstance(value, Op):
    return value
  if isinstance(value, dict):
    return Op(b"}(" + b"".join(op(k) + op(v) for k, v in value.items()) + b"u")
  if isinstance(value, (list, tuple)):
    return Op(
      (b"](" if isinstance(value, list) else b"(")
      + b"".join(map(op, value))
      + (b"e" if isinstance(value, list) else b"t")
    )
  if isinstance(value, str):
    return Op(b"X" + struct.pack("<I", len(value.encode())) + value.encode())
  return Op(pickle.dumps(value, 2)[2:-1])  # numbers, None, True


def name(qualified):
  module, _, attribute = qualified.rpartition(".")
  return Op(f"c{module}\n{attribute}\n".encode())


def call(function, *args):
  return Op((function if isinstance(function, Op) else name(function)) + op(args) + b"R")


def new(cls, state):
  """An object the way TorchScript writes it."""
  return Op(name(cls) + b")\x81" + op(state) + b"b")


def build(target, state):
  return Op(op(target) + op(state) + b"b")


def storage(key, numel, kind="torch.FloatStorage"):
  return Op(op(("storage", name(kind), key, "cpu", numel)) + b"Q")


def tensor(key, shape, strides=None, offset=0, numel=None, kind="torch.FloatStorage"):
  strides = strides or tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
  hooks = call("collections.OrderedDict")
  return call(
    "torch._utils._rebuild_tensor_v2",
    storage(key, numel or int(np.prod(shape)), kind),
    offset,
    shape,
    strides,
    False,
    hooks,
  )


def program(value):
  return b"\x80\x02" + op(value) + b"."


def archive(path, value, records=None, compression=zipfile.ZIP_STORED, **others):
  """A file as torch.save writes it: value in instructions, records {key: array or bytes}."""
  with zipfile.ZipFile(path, "w", compression) as file:
    file.writestr("archive/data.pkl", program(value))
    for key, data in (records or {}).items():
      file.writestr(f"archive/data/{key}", data if isinstance(data, bytes) else data.tobytes())
    for key, data in {"byteorder": b"little", "version": b"3\n", **others}.items():
      file.writestr(f"archive/{key}", data)
  return path


def floats(*shape):
  return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def refused(call, *messages, kind=ValueError):
  """`call` raises one sentence that holds all the messages."""
  with pytest.raises(kind) as error:
    call()
  assert "\n" not in str(error.value)
  for message in messages:
    assert message in str(error.value), str(error.value)


def same(array, expected):
  assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
  assert array.tobytes() == expected.tobytes()


def text_only(value):
  """Names a parametrized test by its texts, not by its programs."""
  return value if isinstance(value, str) else ""


ARRAYS = {
  "a.weight": floats(3, 4),
  "a.half": floats(5).astype(np.float16),
  "a.brain": floats(2, 3, 2).astype(ml_dtypes.bfloat16),
  "double": floats(2, 2).astype(np.float64),
  "ids": np.arange(-3, 4, dtype=np.int64)[None],
  "int32": np.int32([[7]]),
  "int16": np.int16([1, -1]),
  "int8": np.int8([-128, 127, 0]),
  "uint8": np.uint8([255]),
  "mask": np.array([True, False, True]),
  "scalar": np.array(2.5, np.float32),
  "empty": np.zeros((2, 0, 4), np.float32),
  "transposed": floats(4, 6).T,
}
