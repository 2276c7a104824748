"""Exports the functions of a Predictor as StableHLO, with weights, tokenizer and preprocessing.

An exported folder has:

    serving.json            functions with inputs and outputs, preprocessing, special token ids
    <function>.jax          jax.export's serialized StableHLO for all platforms
    weights.safetensors     the parameters of all functions
    tokenizer.json | .model for the tokenizers library, or for sentencepiece
    inputs.py serve.py      an example that runs it without mplug_jax

Shapes in serving.json: b rows (1 to LARGEST_BATCH) and q texts for each are open; the model fixes
all other sizes.
"""

import copy
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export

from mplug_jax.data.images import ops
from mplug_jax.data.text import cleaning, tokenizer_base
from mplug_jax.data.text import wordpiece as wordpiece_lib
from mplug_jax.inference import methods
from mplug_jax.inference.engine import Engine
from mplug_jax.runtime import atomic_files, files
from mplug_jax.tasks import base
from mplug_jax.tensor_files import write

PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST_BATCH = 4096
_IMAGES = (
  "RGB, 8 bits. stretch: Pillow's antialiased resize to a square; proportions change. fit: the "
  "long side becomes `size` and the image is centered on a black square; input `placed` is its "
  "(left, top, right, bottom) on the square, input `size` its original width and height."
)
_NORMALIZED = "inside the functions: (image / 255 - mean) / std"


def _struct(
  task: base.Task, text: methods.Text | None, name: str, b: Any, q: Any
) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of an input.

  Args:
    task: the task of the method.
    text: the texts of the method.
    name: of the input in the task's batch.
    b: number of rows.
    q: number of texts per row.
  """
  data = task.config.data
  size = task.model.image_size
  if text and name == text.key:
    axes = tuple(q if axis == "q" else axis for axis in text.axes)
    return jax.ShapeDtypeStruct((b, *axes, data[text.length]), jnp.int32)
  if name == "image":
    one = base.image_shape(task.config, size)
    shape = (data.images_per_text, *one) if task.separate_images else one
    return jax.ShapeDtypeStruct((b, *shape), jnp.uint8)
  shape = {"placed": (4,), "size": (2,), "box": (q, 4), "label": (1,)}[name]
  return jax.ShapeDtypeStruct((b, *shape), jnp.float32 if name == "box" else jnp.int32)


def export_function(
  task: base.Task,
  params: Mapping[str, Any],
  name: str,
  platforms: Sequence[str] = PLATFORMS,
) -> tuple[jax_export.Exported, dict[str, jax.ShapeDtypeStruct]]:
  """Exports one function.

  Args:
    task: returned by `Predictor.task`.
    params: the parameters, or their shapes, as {"a/b": x}.
    name: one of `methods.functions()`.
    platforms: some of PLATFORMS.

  Returns:
    (exported function ({parameter: array}, {input: array}) -> {output: array}, {input: shape}).
  """
  scope = jax_export.SymbolicScope([f"b <= {LARGEST_BATCH}"])
  b, q = jax_export.symbolic_shape("b, q", scope=scope)
  task = copy.copy(task)
  # Attention kernels belong to one platform and are chosen by sizes that are open here.
  task.model = task.model.clone(attention_impl="reference")
  method, function = methods.functions()[name]
  text = methods.METHODS[method].text
  predict = function.make(task)
  inputs = {key: _struct(task, text, key, b, q) for key in function.inputs}
  labels = {key: _struct(task, text, key, b, q) for key in function.labels}

  def call(params: Any, batch: dict[str, Any]) -> Any:
    batch = batch | {key: jnp.zeros(x.shape, x.dtype) for key, x in labels.items()}
    return predict(traverse_util.unflatten_dict(params, sep="/"), batch)

  shapes = {leaf: jax.ShapeDtypeStruct(x.shape, x.dtype) for leaf, x in params.items()}
  return jax_export.export(jax.jit(call), platforms=platforms)(shapes, inputs), inputs


def _shape_entry(struct: Any) -> dict[str, Any]:
  """Returns a shape and dtype for serving.json."""
  return {
    "shape": [n if isinstance(n, int) else str(n) for n in struct.shape],
    "dtype": str(np.dtype(struct.dtype)),
  }


def _input_entry(
  task: base.Task, text: methods.Text | None, name: str, struct: jax.ShapeDtypeStruct
) -> dict[str, Any]:
  """Returns the entry of an input in serving.json."""
  if not text or name != text.key:
    return {"is": name} | _shape_entry(struct)
  if text.ends:
    ends = "kept"  # the last token of a text that is too long is [eos]
  elif task.tokenizer.encode("a")[-1] == task.tokenizer.eos_id:
    ends = "cut"  # this tokenizer appends [eos] to every text; a text that is too long loses it
  else:
    ends = "open"
  return {
    "is": "text",
    "length": struct.shape[-1],
    "ends": ends,
    "lower": text.words or text.lower,
    "spaces": cleaning.SPACED if text.words else "",
    "deleted": cleaning.DELETED if text.words else "",
    "max_words": task.config.data.max_words if text.words else 0,
  } | _shape_entry(struct)


def _write_tokenizer(tokenizer: Any, folder: pathlib.Path) -> dict[str, Any]:
  """Writes the file of a tokenizer and returns its entry in serving.json."""
  wordpiece = isinstance(tokenizer, wordpiece_lib.WordPieceTokenizer)
  if wordpiece:
    atomic_files.write_atomic(os.path.join(folder, "tokenizer.json"), tokenizer.to_json().encode())
  else:
    tokenizer.save(folder)
    os.remove(os.path.join(folder, tokenizer_base.CONFIG_FILE))
  special = {
    f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "unk", "bos", "eos", "mask")
  }
  return {
    "kind": tokenizer.kind,
    "file": "tokenizer.json" if wordpiece else tokenizer.file_name,
    "vocab_size": tokenizer.vocab_size,
    **special,
    "clean_up": wordpiece_lib.CLEAN_UP if wordpiece else (),
  }


def _image_entry(size: int, frames: int, canvas: bool) -> dict[str, Any]:
  """Returns the entry of serving.json about images."""
  return {
    "size": size,
    "resize": "fit" if canvas else "stretch",
    "filter": "bilinear" if canvas else "bicubic",
    "about": _IMAGES,
    "frames": frames,
    "normalized": _NORMALIZED,
    "mean": ops.MEAN.tolist(),
    "std": ops.STD.tolist(),
  }


def export(
  predictor: Engine,
  dest: str | os.PathLike,
  names: Sequence[str] = (),
  platforms: Sequence[str] = PLATFORMS,
) -> dict[str, Any]:
  """Writes an export folder, completely or not at all.

  Args:
    predictor: a Predictor.
    dest: folder to create.
    names: some of `methods.functions()`; (): all that the checkpoint supports.
    platforms: some of PLATFORMS.

  Returns:
    The content of serving.json.

  Raises:
    ValueError: unknown function or platform, or the checkpoint does not support a function.
    FileExistsError: `dest` exists.
  """
  files.require_local(dest, "an export")
  dest = pathlib.Path(dest)
  functions = methods.functions()
  _check_names("function", names, functions)
  _check_names("platform", platforms, PLATFORMS)
  names = names or [name for name, (method, _) in functions.items() if predictor.can(method)]
  tasks = {name: _task(predictor, name) for name in names}
  if dest.exists():
    raise FileExistsError(f"{dest} exists; name a folder that does not.")
  partial = dest.with_name(f"{dest.name}.partial{os.getpid()}")
  try:
    partial.mkdir(parents=True)
    about = _write_export(predictor, tasks, partial, platforms)
    partial.rename(dest)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return about


def _check_names(kind: str, names: Sequence[str], known: Any) -> None:
  """Raises ValueError if one of the names is unknown."""
  if unknown := sorted(set(names) - set(known)):
    raise ValueError(f"There is no {kind} {unknown[0]!r} to export; there are {', '.join(known)}.")


def _task(predictor: Engine, name: str) -> base.Task:
  """Returns the task of a function. Raises ValueError: the checkpoint does not support it."""
  method, _ = methods.functions()[name]
  canvas = methods.METHODS[method].canvas
  return predictor.task(method, 0 if canvas else predictor.config.data.get("frames", 0))


def _write_export(
  predictor: Engine,
  tasks: Mapping[str, base.Task],
  folder: pathlib.Path,
  platforms: Sequence[str],
) -> dict[str, Any]:
  """Writes the files of an export and returns the content of serving.json.

  Args:
    predictor: a Predictor.
    tasks: {function: its task}.
    folder: an empty folder.
    platforms: some of PLATFORMS.
  """
  params: dict[str, Any] = traverse_util.flatten_dict(predictor.params, sep="/")
  config = predictor.config
  rows = {name: methods.METHODS[methods.functions()[name][0]] for name in tasks}
  canvas = any(row.canvas for row in rows.values())
  about = {
    "platforms": list(platforms),
    "jax": jax.__version__,
    "largest_batch": LARGEST_BATCH,
    "weights": "weights.safetensors",
    "dtype": config.model.dtype,
    "image": _image_entry(config.model.image_size, config.data.get("frames", 0), canvas),
    "tokenizer": _write_tokenizer(predictor.tokenizer, folder),
    "functions": {},
  }
  for name, task in tasks.items():
    exported, inputs = export_function(task, params, name, platforms)
    atomic_files.write_atomic(folder / f"{name}.jax", bytes(exported.serialize()))
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    about["functions"][name] = {
      "inputs": {key: _input_entry(task, rows[name].text, key, x) for key, x in inputs.items()},
      "outputs": {key: _shape_entry(x) for key, x in outputs.items()},
    } | methods.functions()[name][1].constants(task)
  write.save_safetensors(folder / "weights.safetensors", _tensors(params))
  atomic_files.write_json(folder / "serving.json", about)
  for name in ("inputs.py", "serve.py"):
    shutil.copyfile(pathlib.Path(__file__).with_name(name), folder / name)
  return about


def _tensors(params: Mapping[str, Any]) -> Iterator[write.Tensor]:
  """Yields the parameters as tensors of a file."""
  for name, x in params.items():
    yield write.Tensor(name, x.shape, x.dtype, lambda x=x: np.asarray(x))
