"""A task's predict functions as StableHLO, with weights, tokenizer and preprocessing, in one folder.

    serving.json            what is here: functions with their inputs and outputs, image and text preprocessing, special ids
    <function>.jax          jax.export's serialised StableHLO for every platform; the number of rows is left open
    weights.safetensors     the parameters, once for all functions
    tokenizer.json | .model for the tokenizers library, or for sentencepiece
    inputs.py serve.py      an example that runs it without mplug_jax

Shapes in serving.json: b rows (1 to LARGEST_BATCH), q texts about each, both open; everything else is fixed by the model.
"""

import os
import pathlib
import shutil

from flax import traverse_util
import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from mplug_jax import files, torch_write
from mplug_jax.data import image_ops, text_ops, tokenizer as tokenizers, vqa as vqa_data

PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST_BATCH = 4096


def _match(task, params, batch):
  """Whether the caption of a row describes its image -> {"score": f32[B]}, logit of a match."""
  fns, rows = task.predict_fns(), jnp.arange(batch["image"].shape[0], dtype=jnp.int32)
  memory, texts = fns["image_memory"](params, batch), fns["embed_texts"](params, batch)
  return {"score": fns["rerank"](params, {"memory": memory, "texts": texts, "pair_text": rows[:, None]})["score"][:, 0]}


def _of_task(name, *outputs):
  """A predict function as it is, or those `outputs` of it."""
  def call(task, params, batch):
    found = task.predict_fns()[name](params, batch)
    return {key: found[key] for key in outputs} if outputs else found
  return call


_CAPTION = {"generate": (("image",), _of_task("generate"))}
_RETRIEVAL = {"embed_image": (("image",), _of_task("embed_image")), "embed_texts": (("caption",), _of_task("embed_texts", "feature")),
              "match": (("image", "caption"), _match)}
# {config.task.name: {function: (inputs, names of the task's batch, function (task, params, batch) -> arrays)}}
SERVED = {
    "vqa": {name: (("image", "question"), _of_task(name)) for name in ("generate", "rank")},
    "caption": _CAPTION, "scst": _CAPTION,
    "grounding": {"locate": (("image", "placed", "size", "phrase"), _of_task("locate", "box", "score"))},
    "classification": {"classify": (("image", "sentence"), _of_task("classify"))},
    "retrieval": _RETRIEVAL, "pretrain": _RETRIEVAL,
}
_TRUTHS = ("box", "label")  # names of a batch that predict functions look at, and whose values matter to nobody here
# Tokens of a text: "open": cut to the length; "kept": the last one is [eos], even of those that were cut.
_TEXTS = {"question": "open", "caption": "open", "sentence": "open", "phrase": "kept"}
_CLEANED = ("caption", "sentence")  # by text_ops.pre_caption


def functions(task):
  """Names of what can be exported of a task."""
  return [name for name in SERVED[task.config.task.name] if name != "rank" or "rank" in task.predict_fns()]


def _shapes(task):
  """{name of the task's batch: ShapeDtypeStruct with b rows, and q texts a row where there may be several}."""
  rows, texts = jax_export.symbolic_shape("b, q", scope=jax_export.SymbolicScope([f"b <= {LARGEST_BATCH}"]))
  second = {"question": (texts,), "phrase": (texts,), "box": (texts,), "sentence": (1,), "label": (1,)}
  return {name: jax.ShapeDtypeStruct((rows, *second.get(name, x.shape[1:2]), *x.shape[2:]), x.dtype)
          for name, x in task.batch_spec(1).items()}


def export_function(task, params, name, platforms=PLATFORMS):
  """One function of a task -> (jax.export.Exported of ({parameter: array}, {input: array}) -> {output: array}, shapes of the inputs).

  Args:
    task: built with config.eval.batch_size=LARGEST_BATCH, which splits no batch.
    params: its parameters, or their shapes, as {"a/b": x}. name: one of `functions`.
  """
  needed, fn = SERVED[task.config.task.name][name]
  shapes = _shapes(task)
  given, truths = {key: shapes[key] for key in needed}, {key: shapes[key] for key in _TRUTHS if key in shapes}

  def call(params, batch):
    batch = batch | {key: jnp.zeros(x.shape, x.dtype) for key, x in truths.items()}
    return fn(task, traverse_util.unflatten_dict(params, sep="/"), batch)

  arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (dict(params), given))
  return jax_export.export(jax.jit(call), platforms=platforms)(*arguments), given


def _described(struct):
  return {"shape": [n if isinstance(n, int) else str(n) for n in struct.shape], "dtype": str(np.dtype(struct.dtype))}


def _input(task, name, struct):
  """The entry of an input in serving.json."""
  if name not in _TEXTS:
    return {"is": name} | _described(struct)
  cleaned, ends = name in _CLEANED, _TEXTS[name]
  if ends == "open" and task.tokenizer.encode("a")[-1] == task.tokenizer.eos_id:
    ends = "cut"  # this tokenizer ends every text with [eos], which is cut off with the rest
  return {"is": "text", "length": struct.shape[-1], "ends": ends, "lower": cleaned or name == "phrase",
          "spaces": text_ops.SPACED if cleaned else "", "deleted": text_ops.DELETED if cleaned else "",
          "max_words": task.config.data.max_words if cleaned else 0} | _described(struct)


def _tokenizer(tokenizer, folder):
  """Writes the tokenizer for the library it is of -> the entry of serving.json."""
  wordpiece = isinstance(tokenizer, tokenizers.WordPieceTokenizer)
  if wordpiece:
    files.write_atomic(os.path.join(folder, "tokenizer.json"), tokenizer.to_json().encode())
  else:
    tokenizer.save(folder)
    os.remove(os.path.join(folder, tokenizers.CONFIG_FILE))
  special = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "unk", "bos", "eos", "mask")}
  return {"kind": tokenizer.kind, "file": "tokenizer.json" if wordpiece else tokenizer.file_name, "vocab_size": tokenizer.vocab_size,
          **special, "clean_up": tokenizers.CLEAN_UP if wordpiece else ()}


def _image(config):
  """The entry of serving.json about images: what a caller does to them, and what happens inside."""
  fit = config.task.name == "grounding"
  inside = "inside the functions: (image / 255 - mean) / std"
  return {"size": config.model.image_size, "resize": "fit" if fit else "stretch", "filter": "bilinear" if fit else "bicubic",
          "about": "RGB, 8 bits. stretch: Pillow's antialiased resize to a square, proportions not kept. fit: the long side becomes "
                   "`size`, the image stands in the middle of a black square; input `placed` is its (left, top, right, bottom) "
                   "there, input `size` its own width and height.",
          "frames": config.data.get("frames", 0), "normalised": inside, "mean": image_ops.MEAN.tolist(), "std": image_ops.STD.tolist()}


def export(task, params, dest, names=(), platforms=PLATFORMS):
  """Writes the folder `dest`, as a whole or not at all -> what serving.json says.

  Args:
    task, platforms: see `export_function`. params: its parameters. names: of `functions`; (): all of them.

  Raises:
    ValueError: a function or platform that there is not. FileExistsError: `dest` exists.
  """
  dest, known, params = pathlib.Path(dest), functions(task), traverse_util.flatten_dict(params, sep="/")
  for what, given, there in (("function", names, known), ("platform", platforms, PLATFORMS)):
    if unknown := sorted(set(given) - set(there)):
      raise ValueError(f"There is no {what} {unknown[0]!r} to export for the task {task.config.task.name}; there are {', '.join(there)}.")
  if dest.exists():
    raise FileExistsError(f"{dest} exists; name a folder that does not.")
  partial = dest.with_name(f"{dest.name}.partial{os.getpid()}")
  try:
    partial.mkdir(parents=True)
    about = {"task": task.config.task.name, "platforms": list(platforms), "jax": jax.__version__, "largest_batch": LARGEST_BATCH,
             "weights": "weights.safetensors", "dtype": task.config.model.dtype, "image": _image(task.config),
             "tokenizer": _tokenizer(task.tokenizer, partial), "functions": {}}
    for name in names or known:
      exported, given = export_function(task, params, name, platforms)
      files.write_atomic(partial / f"{name}.jax", exported.serialize())
      outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
      about["functions"][name] = {"inputs": {key: _input(task, key, x) for key, x in given.items()},
                                  "outputs": {key: _described(x) for key, x in outputs.items()}}
    about |= _answers(task)
    torch_write.save_safetensors(partial / "weights.safetensors", (
        torch_write.Tensor(name, x.shape, x.dtype, lambda x=x: np.asarray(x)) for name, x in params.items()))
    files.write_json(partial / "serving.json", about)
    for name in ("inputs.py", "serve.py"):
      shutil.copyfile(pathlib.Path(__file__).with_name(name), partial / name)
    partial.rename(dest)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  return about


def _answers(task):
  """What the numbers in outputs stand for."""
  found = {}
  if "rank" in functions(task):
    found["answers"] = list(vqa_data.candidate_answers(task.config))
  if task.config.task.name == "classification":
    found["labels"] = list(task.config.data.labels)
  if hasattr(task, "prompt"):
    found["prompt"] = task.prompt.said  # the tokens of a caption begin with it
  return found
