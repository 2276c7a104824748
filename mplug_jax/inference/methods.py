"""What a checkpoint can be asked: the task behind each method of Predictor, the parts it needs, and its settings."""

from typing import NamedTuple

from ml_collections import ConfigDict

from mplug_jax import tasks


class Method(NamedTuple):
  """What a method of Predictor needs.

  verb: in a message. task: whose predict functions it runs. trained: tasks that teach it. parts: of the parameters, beside the image
  encoder. config: what trains a checkpoint for it.
  """

  verb: str
  task: str
  trained: tuple
  parts: tuple
  config: str


_FUSED = ("text_encoder", "fusion_encoder")
_DECODED = (*_FUSED, "text_decoder")
_CLASSES = (*_FUSED, "cls_head")
METHODS = {
  "answer": Method("answer questions", "vqa", ("vqa", "pretrain"), _DECODED, "configs/vqa.py"),
  "caption": Method(
    "tell what it sees",
    "caption",
    ("caption", "scst", "pretrain"),
    ("text_decoder",),
    "configs/caption.py",
  ),
  "match": Method(
    "match images with texts",
    "retrieval",
    ("retrieval", "pretrain"),
    (*_FUSED, "vision_proj", "text_proj", "itm_head", "temp"),
    "configs/retrieval.py",
  ),
  "embed": Method(
    "embed images and texts",
    "retrieval",
    ("retrieval", "pretrain"),
    ("text_encoder", "vision_proj", "text_proj"),
    "configs/retrieval.py",
  ),
  "locate": Method(
    "locate what a phrase means", "grounding", ("grounding",), _DECODED, "configs/grounding.py"
  ),
  "compare": Method(
    "judge statements about two images",
    "classification",
    ("classification",),
    _CLASSES,
    "configs/nlvr2.py",
  ),
  "entails": Method(
    "judge statements about an image",
    "classification",
    ("classification",),
    _CLASSES,
    "configs/snli_ve.py",
  ),
}
_IMAGES_OF_A_STATEMENT = {"compare": 2, "entails": 1}

_SAME_SETTINGS = {
  "caption": "scst",
  "retrieval": "pretrain",
}  # tasks whose config.task has all of the other's
# Settings of a task that the checkpoint was not fine-tuned for: (config.task, config.data).
_ZERO_SHOT = {
  "vqa": (
    {
      "beams": 3,
      "min_length": 1,
      "max_length": 10,
      "beam_mode": "standard",
      "predict": "generate",
      "rank_answers": (),
      "rank_top_k": 128,
      "rank_first_token_twice": False,
      "distill": {"alpha": 0.0, "ramp_steps": 0, "axis": "vocabulary"},
    },
    {"max_question": 32},
  ),
  "caption": (
    {
      "prompt": "",
      "prompt_mode": "mended",
      "beams": 3,
      "min_length": 1,
      "max_length": 25,
      "beam_mode": "standard",
      "no_repeat_ngram": 0,
    },
    {"max_caption": 32},
  ),
  "retrieval": (
    {
      "queue": 0,
      "alpha": 0.0,
      "ramp_steps": 0,
      "match": "image",
      "contrast_chunk": 0,
      "clamp_temperature": True,
      "negatives": {"group": 0, "greedy": False, "ramp_steps": 0},
      "rerank_k": 32,
      "rerank_texts": 16,
      "rerank_similarity": "none",
    },
    {"max_words": 30, "max_caption": 30},
  ),
}


def refusal(name, where, parts, config):
  """Why a checkpoint cannot do what the method `name` needs, one sentence; "" if it can.

  Args:
    where: what the sentence calls the checkpoint. parts: names of the parts that it has. config: its ConfigDict.
  """
  method, known = METHODS[name], config.task.name
  advice = f"train one with --config={method.config}:init={where}"
  if missing := [part for part in ("visual_encoder", *method.parts) if part not in parts]:
    return (
      f"{where} cannot {method.verb}: a {known} checkpoint has no {', '.join(missing)}; {advice}."
    )
  if known not in method.trained:
    return f"{where} cannot {method.verb}: it was trained for {known}; {advice}."
  if (
    name in _IMAGES_OF_A_STATEMENT
    and (count := config.data.images_per_text) != _IMAGES_OF_A_STATEMENT[name]
  ):
    return f"{where} cannot {method.verb}: its cls_head reads {count} image{'s' * (count > 1)}; {advice}."
  return ""


def make_task(name, model, config, tokenizer, frames=0, **changes):
  """The Task behind the method `name`, with the checkpoint's own settings where it was trained for that task.

  Args:
    frames: of clips; 0: images. changes: of config.task.
  """
  wanted = METHODS[name].task
  task, data = _ZERO_SHOT.get(wanted, ({}, {}))
  if config.task.name in (wanted, _SAME_SETTINGS.get(wanted)):
    task, data = task | config.task.to_dict(), data | config.data.to_dict()
  settings = ConfigDict(
    {
      "task": {**task, "name": wanted, **changes},
      "data": {**data, "frames": frames},
      "ema": config.ema,
      "optim": config.optim,
      "batch_size": config.batch_size,
      "model": config.model,
      "eval": config.eval,
    }
  )
  if "max_positions" in settings.model:
    for key in ("max_question", "max_caption"):
      if key in settings.data:
        settings.data[key] = min(settings.data[key], settings.model.max_positions)
  return tasks.get(wanted)(model, settings, tokenizer)
