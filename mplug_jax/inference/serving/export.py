"""What a Predictor does as StableHLO, with weights, tokenizer and preprocessing, in one folder.

    serving.json            what is here: functions with their inputs and outputs, image and text preprocessing, special ids
    <function>.jax          jax.export's serialised StableHLO for every platform; the number of rows is left open
    weights.safetensors     the parameters, once for all functions
    tokenizer.json | .model for the tokenizers library, or for sentencepiece
    inputs.py serve.py      an example that runs it without mplug_jax

Shapes in serving.json: b rows (1 to LARGEST_BATCH), q texts about each, both open; everything else
is fixed by the model.
"""

import copy
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export

from mplug_jax.data.images import ops
from mplug_jax.data.text import cleaning, tokenizer_base
from mplug_jax.data.text import wordpiece as wordpiece_lib
from mplug_jax.inference import methods
from mplug_jax.runtime import atomic_files
from mplug_jax.tasks import base
from mplug_jax.tensor_files import write

PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST_BATCH = 4096


# Texts: (their length in config.data, tokens of those that are too long: "open": cut; "kept": cut,
# but for [eos]; cleaned by text_ops.pre_caption).
_TEXTS = {
  "question": ("max_question", "open", False),
  "caption": ("max_caption", "open", True),
  "sentence": ("max_text", "open", True),
  "phrase": ("max_phrase", "kept", False),
}


def _struct(task, name, b, q):
  """ShapeDtypeStruct of an input with b rows, and q texts a row where there may be several."""
  data, size = task.config.data, task.model.image_size
  if name == "image":
    pair = task.config.task.name == "classification"
    shape = (data.images_per_text, size, size, 3) if pair else base.image_shape(task.config, size)
  elif name in _TEXTS:
    count = {"question": (q,), "phrase": (q,), "sentence": (1,), "caption": ()}[name]
    shape = (*count, data[_TEXTS[name][0]])
  else:
    shape = {"placed": (4,), "size": (2,), "box": (q, 4), "label": (1,)}[name]
  return jax.ShapeDtypeStruct(
    (b, *shape), {"image": jnp.uint8, "box": jnp.float32}.get(name, jnp.int32)
  )


def export_function(task, params, name, platforms=PLATFORMS):
  """One of methods.functions() -> (jax.export.Exported of ({parameter: array}, {input: array}) -> {output: array}, shapes of the inputs).

  Args:
    task: of Predictor.task. params: its parameters, or their shapes, as {"a/b": x}.
  """
  open_sizes = jax_export.symbolic_shape(
    "b, q", scope=jax_export.SymbolicScope([f"b <= {LARGEST_BATCH}"])
  )
  task = copy.copy(task)
  task.model = task.model.clone(
    attention_impl="reference"
  )  # kernels are of one platform, and chosen by numbers that are open here
  _, function = methods.functions()[name]
  predict = function.make(task)
  given = {key: _struct(task, key, *open_sizes) for key in function.inputs}
  labels = {key: _struct(task, key, *open_sizes) for key in function.labels}

  def call(params, batch):
    batch = batch | {key: jnp.zeros(x.shape, x.dtype) for key, x in labels.items()}
    return predict(traverse_util.unflatten_dict(params, sep="/"), batch)

  arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (dict(params), given))
  return jax_export.export(jax.jit(call), platforms=platforms)(*arguments), given


def _described(struct):
  return {
    "shape": [n if isinstance(n, int) else str(n) for n in struct.shape],
    "dtype": str(np.dtype(struct.dtype)),
  }


def _input(task, name, struct):
  """The entry of an input in serving.json."""
  if name not in _TEXTS:
    return {"is": name} | _described(struct)
  _, ends, cleaned = _TEXTS[name]
  if ends == "open" and task.tokenizer.encode("a")[-1] == task.tokenizer.eos_id:
    ends = "cut"  # this tokenizer ends every text with [eos], which is cut off with the rest
  return {
    "is": "text",
    "length": struct.shape[-1],
    "ends": ends,
    "lower": cleaned or name == "phrase",
    "spaces": cleaning.SPACED if cleaned else "",
    "deleted": cleaning.DELETED if cleaned else "",
    "max_words": task.config.data.max_words if cleaned else 0,
  } | _described(struct)


def _tokenizer(tokenizer, folder):
  """Writes the tokenizer for the library it is of -> the entry of serving.json."""
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


def _image(config, frames):
  """The entry of serving.json about images: what a caller does to them, and what happens inside."""
  fit = config.task.name == "grounding"
  inside = "inside the functions: (image / 255 - mean) / std"
  return {
    "size": config.model.image_size,
    "resize": "fit" if fit else "stretch",
    "filter": "bilinear" if fit else "bicubic",
    "about": "RGB, 8 bits. stretch: Pillow's antialiased resize to a square, proportions not "
    "kept. fit: the long side becomes "
    "`size`, the image stands in the middle of a black square; input `placed` is its (left, top, "
    "right, bottom) "
    "there, input `size` its own width and height.",
    "frames": frames,
    "normalised": inside,
    "mean": ops.MEAN.tolist(),
    "std": ops.STD.tolist(),
  }


def export(predictor, dest, names=(), platforms=PLATFORMS):
  """Writes the folder `dest`, as a whole or not at all -> what serving.json says.

  Args:
    predictor: a Predictor. names: of methods.functions(); (): all that its checkpoint can do.
      platforms: of PLATFORMS.

  Raises:
    ValueError: a function or platform that there is not, or a function that the checkpoint cannot
      do. FileExistsError: `dest` exists.
  """
  dest, params = pathlib.Path(dest), traverse_util.flatten_dict(predictor.params, sep="/")
  functions = methods.functions()
  for what, given, there in (("function", names, functions), ("platform", platforms, PLATFORMS)):
    if unknown := sorted(set(given) - set(there)):
      raise ValueError(
        f"There is no {what} {unknown[0]!r} to export; there are {', '.join(there)}."
      )
  names = names or [name for name, (method, _) in functions.items() if predictor.can(method)]
  frames = predictor.config.data.get("frames", 0)
  tasks = {
    name: predictor.task(method, 0 if methods.METHODS[method].canvas else frames)
    for name in names
    for method, _ in [functions[name]]
  }
  if dest.exists():
    raise FileExistsError(f"{dest} exists; name a folder that does not.")
  partial = dest.with_name(f"{dest.name}.partial{os.getpid()}")
  try:
    partial.mkdir(parents=True)
    about = {
      "platforms": list(platforms),
      "jax": jax.__version__,
      "largest_batch": LARGEST_BATCH,
      "weights": "weights.safetensors",
      "dtype": predictor.config.model.dtype,
      "image": _image(predictor.config, frames),
      "tokenizer": _tokenizer(predictor.tokenizer, partial),
      "functions": {},
    }
    for name, task in tasks.items():
      exported, given = export_function(task, params, name, platforms)
      atomic_files.write_atomic(partial / f"{name}.jax", exported.serialize())
      outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
      about["functions"][name] = {
        "inputs": {key: _input(task, key, x) for key, x in given.items()},
        "outputs": {key: _described(x) for key, x in outputs.items()},
      } | functions[name][1].constants(task)
    write.save_safetensors(
      partial / "weights.safetensors",
      (
        write.Tensor(name, x.shape, x.dtype, lambda x=x: np.asarray(x))
        for name, x in params.items()
      ),
    )
    atomic_files.write_json(partial / "serving.json", about)
    for name in ("inputs.py", "serve.py"):
      shutil.copyfile(pathlib.Path(__file__).with_name(name), partial / name)
    partial.rename(dest)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return about
