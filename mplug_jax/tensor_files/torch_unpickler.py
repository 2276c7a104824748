"""What torch.save or torch.jit.save pickled, as descriptions of tensors: without PyTorch, and without running any of it.

A pickle is a program: it names functions and calls them. `load` knows the few names a state dict needs (ordered dictionaries,
storages, the functions that rebuild a tensor) as inert stand-ins of its own; every other name becomes a `Placeholder`
class, which takes any arguments, state and items and does nothing. No name in the file is ever imported.
"""

import collections
import dataclasses
import io
import math
import pickle
import pickletools

import ml_dtypes
import numpy as np

# (numpy and torch name, torch's storage class, safetensors code). Without a storage class: rebuilt by _rebuild_tensor_v3 only.
_DTYPE_ROWS = (
  ("float64", "DoubleStorage", "F64"),
  ("float32", "FloatStorage", "F32"),
  ("float16", "HalfStorage", "F16"),
  ("bfloat16", "BFloat16Storage", "BF16"),
  ("int64", "LongStorage", "I64"),
  ("int32", "IntStorage", "I32"),
  ("int16", "ShortStorage", "I16"),
  ("int8", "CharStorage", "I8"),
  ("uint8", "ByteStorage", "U8"),
  ("bool", "BoolStorage", "BOOL"),
  ("complex64", "ComplexFloatStorage", "C64"),
  ("complex128", "ComplexDoubleStorage", ""),
  ("uint64", "", "U64"),
  ("uint32", "", "U32"),
  ("uint16", "", "U16"),
  ("float8_e4m3fn", "", "F8_E4M3"),
  ("float8_e5m2", "", "F8_E5M2"),
)


def _dtype(name):
  return np.dtype(getattr(ml_dtypes, name, name))


TORCH_DTYPES = {name: _dtype(name) for name, _, _ in _DTYPE_ROWS}
STORAGES = {storage: _dtype(name) for name, storage, _ in _DTYPE_ROWS if storage}
SAFETENSORS = {code: _dtype(name) for name, _, code in _DTYPE_ROWS if code}

# Deeper than any model, far below Python's recursion limit; a hostile archive may nest or share its modules without end.
_MAX_DEPTH = 100
_MAX_NODES = 1_000_000
# Bytes that a view may have beyond its storage: a stride of 0 repeats elements, in a few bytes of pickle without end.
_MAX_EXPANDED = 1 << 30


class _Fixed:
  """What a pickle can name or build, but not change: the BUILD instruction would set attributes."""

  def __setstate__(self, state):
    raise pickle.UnpicklingError(f"the pickle tries to change a {type(self).__name__}")


class StateDict(dict):
  """Stands for collections.OrderedDict; drops attributes (`_metadata`), which could shadow methods."""

  __slots__ = ()

  def __setstate__(self, state):
    pass


class Placeholder:
  """Stands for an object of an unknown class or the result of an unknown function. Keeps what was put into it as its state."""

  __slots__ = ("state",)
  qualified_name = ""
  counts: collections.Counter

  def __new__(cls, *unused_args, **unused_kwargs):
    self = super().__new__(cls)
    self.state = None
    cls.counts[cls.qualified_name] += 1
    return self

  def __setstate__(self, state):
    self.state = state

  def __call__(self, *unused_args, **unused_kwargs):
    return self

  def __setitem__(self, key, value):
    pass

  def append(self, item):
    pass

  def extend(self, items):
    pass


@dataclasses.dataclass(frozen=True)
class Broken(_Fixed):
  """A tensor that cannot be rebuilt, and why: an error only if somebody needs it."""

  reason: str


@dataclasses.dataclass(frozen=True)
class _StorageType(_Fixed):
  dtype: np.dtype | None  # None: untyped, counted in bytes


@dataclasses.dataclass(frozen=True)
class _DType(_Fixed):
  # Not the numpy object itself, which has a __setstate__ of its own that changes it for the whole process.
  dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Storage(_Fixed):
  """A record of the archive: its key, dtype (None if untyped) and number of elements (bytes if untyped)."""

  key: str
  dtype: np.dtype | None
  numel: int

  @property
  def nbytes(self):
    return self.numel * (self.dtype.itemsize if self.dtype else 1)


@dataclasses.dataclass(frozen=True)
class TensorRef(_Fixed):
  """A view of a storage: offset and strides in elements of `dtype`."""

  storage: Storage
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def span(self):
    """Number of elements from the first one of the view to its last one."""
    return (
      1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides)) if math.prod(self.shape) else 0
    )

  @property
  def contiguous(self):
    expected = 1
    for n, stride in zip(reversed(self.shape), reversed(self.strides)):
      if n != 1 and stride != expected:
        return False
      expected *= n
    return True


def describe(value) -> str:
  """A value of an unpickled file in a few words; never its contents, which may be endless."""
  if isinstance(value, Placeholder):
    return f"an object of {value.qualified_name}"
  if isinstance(value, type) and issubclass(value, Placeholder):
    return f"the name {value.qualified_name}"
  if isinstance(value, (TensorRef, Broken)):
    return "a tensor"
  if isinstance(value, dict):
    entries = [f"{name_of(key)[:60]!r}: {type_name(x)}" for key, x in list(value.items())[:8]]
    more = f", and {len(value) - 8} more" if len(value) > 8 else ""
    return f"a dictionary with {', '.join(entries)}{more}" if value else "an empty dictionary"
  return f"a {type_name(value)}"


def name_of(key) -> str:
  """A dictionary's key as text; of a key that is no string its type alone, as its contents may be endless."""
  return key if isinstance(key, str) else f"<{type_name(key)}>"


def type_name(value) -> str:
  """The type of a value of an unpickled file, by the name it has in the file."""
  if isinstance(value, Placeholder):
    return value.qualified_name
  return {TensorRef: "tensor", Broken: "tensor", StateDict: "dict"}.get(
    type(value), type(value).__name__
  )


def possible_shape(shape, itemsize: int, max_bytes: int = 1 << 62) -> bool:
  """Whether numpy can make an array of this shape, which then has at most `max_bytes`."""
  return (
    len(shape) <= 64 and math.prod(max(n, 1) for n in shape) * itemsize <= max_bytes
  )  # numpy counts an empty dimension as one


def _make(storage, offset, shape, strides, dtype):
  if isinstance(storage, Broken):
    raise ValueError(storage.reason)
  if not isinstance(storage, Storage):
    raise ValueError(f"it needs a storage and the file gives {describe(storage)}")
  if dtype is None:
    raise ValueError("its storage is untyped and no dtype is given")
  if not isinstance(shape, (tuple, list)) or not isinstance(strides, (tuple, list)):
    raise ValueError(f"its shape is {describe(shape)}, its strides are {describe(strides)}")
  numbers = (offset, *shape, *strides)
  if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
    raise ValueError("its offset, shape or strides are not whole numbers")
  if not possible_shape(shape, dtype.itemsize, max(_MAX_EXPANDED, storage.nbytes)):
    raise ValueError("its shape is far larger than its storage")
  ref = TensorRef(storage, dtype, offset, tuple(shape), tuple(strides))
  if (offset + ref.span) * dtype.itemsize > storage.nbytes:
    raise ValueError(f"it reaches beyond its storage of {storage.nbytes} bytes")
  return ref


def _tensor(storage, offset, shape, strides, _requires_grad=False, _hooks=None, views=None):
  _check_views(views)
  return _make(storage, offset, shape, strides, getattr(storage, "dtype", None))


def _tensor_v3(storage, offset, shape, strides, _requires_grad, _hooks, dtype, views=None):
  _check_views(views)
  return _make(storage, offset, shape, strides, dtype.dtype if isinstance(dtype, _DType) else None)


def _check_views(views):
  """PyTorch negates and conjugates lazily: the storage has other numbers than the tensor."""
  if views is not None and (
    not isinstance(views, dict) or any(value is not False for value in views.values())
  ):
    raise ValueError("it is a negated or conjugated view; save x.resolve_neg().resolve_conj()")


def _parameter(data, *unused):
  if not isinstance(data, (TensorRef, Broken)):
    raise ValueError(f"it needs a tensor and the file gives {describe(data)}")
  return data


def _from_type(function, _type, args, *unused):
  """A tensor with attributes: function(*args), where only the functions below count."""
  if not isinstance(function, Function):
    raise ValueError(f"it is made by {describe(function)}")
  return function(*args)


def _unknown(*unused):
  raise ValueError("quantized, sparse and other special tensors are not supported")


class Function(_Fixed):
  """One of the functions above under the name a pickle knows; gives `Broken` for what cannot be rebuilt."""

  def __init__(self, function):
    self._function = function

  def __call__(self, *args):
    try:
      return self._function(*args)
    except (TypeError, ValueError) as error:
      return Broken(str(error))


_NAMES = {
  "collections.OrderedDict": StateDict,
  "torch.Size": Function(lambda sizes=(): tuple(sizes)),
  "torch.device": Function(lambda *unused: "device"),  # not its text: an argument's may be endless
  "torch._utils._rebuild_tensor": Function(_tensor),
  "torch._utils._rebuild_tensor_v2": Function(_tensor),
  "torch._utils._rebuild_tensor_v3": Function(_tensor_v3),
  "torch._utils._rebuild_parameter": Function(_parameter),
  "torch._utils._rebuild_parameter_with_state": Function(_parameter),
  "torch._tensor._rebuild_from_type_v2": Function(_from_type),
  "torch.UntypedStorage": _StorageType(None),
  "torch.storage.UntypedStorage": _StorageType(None),
  **{f"torch.{name}": _StorageType(dtype) for name, dtype in STORAGES.items()},
  **{f"torch.cuda.{name}": _StorageType(dtype) for name, dtype in STORAGES.items()},
  **{f"torch.{name}": _DType(dtype) for name, dtype in TORCH_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
  """Python's unpickler, with the two places where a pickle reaches outside closed."""

  def __init__(self, data, names):
    super().__init__(
      io.BytesIO(data), encoding="latin-1"
    )  # byte strings of Python 2: any byte decodes
    self._names = names
    self.counts = collections.Counter()
    self._placeholders = {}

  def find_class(self, module, name):
    full = ascii(f"{module}.{name}")[1:-1]  # it ends up in messages of one line
    if full in self._names:
      return self._names[full]
    self.counts[full] += 0  # mentioned
    if full.startswith("torch._utils._rebuild"):
      self.counts[full] += 1
      return Function(_unknown)
    if full not in self._placeholders:
      # A class for each name, since some instructions need a class; made for this file, so that nothing outlives it.
      self._placeholders[full] = type(
        "_Placeholder",
        (Placeholder,),
        {"__slots__": (), "qualified_name": full, "counts": self.counts},
      )
    return self._placeholders[full]

  def persistent_load(self, pid):
    if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage":
      _, kind, key, _, numel = pid[:5]
      if (
        isinstance(kind, _StorageType)
        and isinstance(key, str)
        and type(numel) is int
        and 0 <= numel < 1 << 62
      ):
        return Storage(key, kind.dtype, numel)
      return Broken(f"its storage is {describe(kind)}")
    return Broken("its storage has an unknown form")


def _check_memo(data):
  """Python's unpickler allocates a list as long as the largest memo index, up to 64 GiB for one damaged byte."""
  file, name = io.BytesIO(data), ""
  while name != "STOP":
    position = file.tell()
    opcode = pickletools.code2op.get(file.read(1).decode("latin-1"))
    if opcode is None:
      raise pickle.UnpicklingError(f"no instruction after {position} bytes")
    name = opcode.name
    if (
      name == "STRING"
    ):  # a byte string of Python 2, a line of any bytes; pickletools insists on ASCII
      file.readline()
      continue
    argument = opcode.arg.reader(file) if opcode.arg else None
    if name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > position:  # picklers count from 0
      raise pickle.UnpicklingError(f"memo index {argument} after {position} bytes")


def load(
  data: bytes, path: str, names=None, what: str = "checkpoint"
) -> tuple[object, dict[str, int]]:
  """Reads a pickle.

  Args:
    data: the pickle.
    path: its file, for the error.
    names: {qualified name: what stands for it} beside those of PyTorch; nothing in it may act on anything but itself.
    what: what the file should be, for the error.

  Returns:
    (the object: dicts, lists, numbers, `TensorRef`, `Placeholder`, ...; {name of an unknown class or function: number of
    objects it would have made, at least 1}).

  Raises:
    ValueError: not a pickle, cut short, or one that does what no state dict needs.
  """
  unpickler = _Unpickler(data, _NAMES | (names or {}))
  try:
    _check_memo(data)
    value = unpickler.load()
  except Exception as error:  # instructions of a stranger fail in any way
    problem = f"{type(error).__name__}: {error}".replace("\n", " ")
    raise ValueError(
      f"{path}: its pickle cannot be read ({problem}); the file is damaged or no {what}."
    ) from error
  return value, {name: max(count, 1) for name, count in unpickler.counts.items()}


# Where training scripts, DeepSpeed and Lightning keep the model's tensors.
_WRAPPERS = ("model", "module", "state_dict")


def find_state_dict(root, is_tensor, path=()) -> tuple[tuple[str, ...], dict] | None:
  """The dictionary of tensors inside a checkpoint: entry "model", else "module", else "state_dict", else the top level.

  Args:
    root: the unpickled checkpoint.
    is_tensor: value -> bool.

  Returns:
    (names of the entries that lead to it, the dictionary), or None if there is none.
  """
  if not isinstance(root, dict) or len(path) > len(_WRAPPERS):
    return None
  for key in _WRAPPERS:
    if key in root and (found := find_state_dict(root[key], is_tensor, (*path, key))):
      return found
  return (path, root) if any(map(is_tensor, root.values())) else None


def flatten_modules(root: Placeholder, path: str) -> dict:
  """The tree of module objects of a TorchScript archive -> {"visual.conv1.weight": value}, tensors and other attributes alike.

  Raises:
    ValueError: a tree that does not end.
  """
  flat = {}
  visited = 0
  stack = [("", root, 0)]
  while stack:
    name, value, depth = stack.pop()
    visited += 1
    if depth > _MAX_DEPTH or visited > _MAX_NODES:
      raise ValueError(f"{path}: its module objects are nested without end; the file is damaged.")
    if isinstance(value, Placeholder) and isinstance(value.state, dict):
      # Reversed, as the last one pushed is the next one visited: the attributes keep their order.
      stack += [
        (f"{name}.{key}" if name else key, x, depth + 1)
        for key, x in reversed(value.state.items())
        if isinstance(key, str)
      ]
    else:
      flat[name] = value
  return flat
