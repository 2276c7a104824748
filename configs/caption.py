"""Image captioning by cross-entropy.

    python -m mplug_jax.main --config=configs/caption.py

trains the small preset on generated scenes of coloured shapes (20,000 images with five captions each) from random
initialisation, and reports CIDEr-D on 1,000 test scenes. `:blank=true` shows black images instead, to measure what
captions get that tell nothing of their image. configs/caption_scst.py goes on from such a run.

    python -m mplug_jax.main --config=configs/caption.py:base,data=karpathy,root=/data/coco,init=FOLDER --config.tokenizer.path=vocab.txt

is the paper's recipe: 384 px, batch 1,024 (docs/official.md item 51), 5 epochs of a record for every sentence, from the weights
that tools.convert_checkpoint left in FOLDER. It reads the official json files under `root` (caption_train.json, caption_val.json,
caption_test.json; other names: --config.data.train_files and so on, which may all be Karpathy's dataset_coco.json), images
in train2014_img/ and val2014_img/, or train2014/ and val2014/. It evaluates the test split once, at the end; to choose among
epochs, set eval.split=val and eval.every. The paper reports CIDEr 137.5 (base) and 141.0 (large). Hardware: TPU v5e-16 or the like;
on less, raise config.optim.microbatches.

    python -m mplug_jax.main --mode=evaluate --checkpoint=RUN --config=configs/caption.py:base,data=nocaps,root=/data/nocaps

captions NoCaps (caption_val.json, caption_test.json in its own format, images/) with a trained run, and scores its domains apart.

    python -m mplug_jax.main --config=configs/caption.py:data=jsonl,root=/my/data

reads train.jsonl, val.jsonl and test.jsonl under `root`, a line {"image", "caption": one or a list, optionally "image_id"} for
each image.
"""

import os

from mplug_jax import config


def get_config(arg=""):
  arg = config.parse_arg(arg, data="scenes", root="", init="", res=0, steps=0, blank=False)
  c = config.defaults("caption", arg.size)
  c.task.update({
      "prompt": "", "prompt_mode": "mended",  # or "official": docs/official.md item 32
      "beams": 3, "min_length": 1, "max_length": 40, "beam_mode": "standard", "no_repeat_ngram": 0,
  })
  c.data.update({
      "name": arg.data, "examples": "caption",
      "captions_per_image": 5,   # of a training record: an epoch has every caption once; 1: a record a sentence, as official
      "max_caption": 40,         # tokens, [CLS], prompt and [SEP] included
      "strict": False, "blank_image": arg.blank, "augment": {"scale": (1.0, 1.0), "flip": 0.0, "randaugment": ()},
  })
  _DATA.get(arg.data, _unknown)(c, arg)
  if arg.size in ("base", "large", "huge"):
    _paper(c)
  else:
    # From random initialisation on little data: dropout would only slow the image encoder down.
    c.optim.update({"name": "muon", "lr": 1e-3, "b2": 0.98})
    c.optim.schedule.warmup_steps = 50
    c.model.update({"dropout": 0.0, "attention_dropout": 0.0, "vision_attention_dropout": 0.0})
  if arg.size == "tiny":
    c.update({"batch_size": 8, "total_steps": 4, "log_every": 2})
    c.eval.update({"batch_size": 8, "limit": 16})
    c.optim.schedule.warmup_steps = 1
  if arg.res:
    c.model.image_size = arg.res
  if arg.steps:
    c.total_steps = arg.steps
  if arg.init:
    # Pre-trained weights have parts that captioning does without.
    c.init.update({"paths": (arg.init,),
                   "unused": ("(vision_proj|text_proj|itm_head|temp|text_encoder|fusion_encoder)/.*",)})
  return c.lock()


def _scenes(c, arg):
  """Scenes name sides, so nothing is mirrored, and every object counts, so nothing is cropped."""
  c.total_steps = 3000
  c.data.update({"size": arg.res or 96, "seed": 0, "difficulty": "default", "records": 64 if arg.size == "tiny" else 0,
                 "max_caption": 32})
  c.task.max_length = 31
  c.tokenizer.records = 2000     # of 20,000: few words, often repeated
  c.model.image_size = arg.res or 96


def _files(c, arg, prefix, images, suffix):
  """Sources read from files under `root`."""
  def under_root(name):
    return os.path.join(arg.root, name)
  c.total_epochs = 5
  c.data.update({
      "train_files": (under_root(f"{prefix}train.{suffix}"),), "val_file": under_root(f"{prefix}val.{suffix}"),
      "test_file": under_root(f"{prefix}test.{suffix}"), "image_root": under_root(images)})
  c.tokenizer.vocab_size = 4000  # of a fitted one


def _karpathy(c, arg):
  _files(c, arg, "caption_", "", "json")


def _nocaps(c, arg):
  """Also other data in the format of COCO captions. NoCaps has no training split, and its test split no captions."""
  _files(c, arg, "caption_", "images", "json")
  c.eval.split = "val"


def _jsonl(c, arg):
  _files(c, arg, "", "", "jsonl")


_DATA = {"scenes": _scenes, "karpathy": _karpathy, "nocaps": _nocaps, "jsonl": _jsonl}


def _unknown(c, arg):
  raise ValueError(f"The config argument data={arg.data!r} is unknown; there are {', '.join(_DATA)}.")


def _paper(c):
  """The official fine-tuning: learning rates, schedule, batch, augmentation, beam search."""
  c.update({"batch_size": 1024, "log_every": 50})
  c.task.update({"beams": 5, "min_length": 8, "max_length": 25, "beam_mode": "reference"})
  c.data.update({"captions_per_image": 1, "max_caption": 25})
  if c.data.name != "scenes":
    c.data.augment.update({"scale": (0.5, 1.0), "flip": 0.5, "randaugment": (2, 7)})
  c.model.update({"dtype": "bfloat16", "remat": "none" if c.model.vision_layers == 12 else "full"})
  c.optim.update({"lr": 1e-5, "visual_lr": 5e-6, "groups": "official"})
  # Assigned, for `update` would keep the fields of the default schedule. One unit: of the official four, three pass in
  # iterations that only accumulate.
  c.optim.schedule = {"name": "official", "epochs": 5, "warmup_units": 1, "warmup_lr": 1e-5, "min_lr": 1e-6}
  c.checkpoint.every = 500
