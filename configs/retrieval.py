"""Image-text retrieval: contrastive learning and image-text matching, evaluated with re-ranking.

    python -m mplug_jax.main --config=configs/retrieval.py

trains the small preset on generated scenes of coloured shapes (20,000 images with five captions each) from random
initialisation, and reports recall on 500 test scenes and their 2,500 captions, beside what chance and an oracle get: several
scenes fit most captions. `:blank=true` shows black images instead.

    python -m mplug_jax.main --config=configs/retrieval.py:large,data=coco,root=/data/coco,init=FOLDER --config.tokenizer.path=vocab.txt

is the paper's recipe: 336 px (base: 384), batch 1,024, 8 epochs, queues of 65,536, the best 256 candidates re-ranked, from the
weights that tools.convert_checkpoint left in FOLDER. It reads the official json files under `root` (coco_train.json, coco_val.json,
coco_test.json; data=flickr30k: flickr30k_train.json and so on; other names: --config.data.train_files and so on) with image
names under `root`. It evaluates the test split once, at the end; to choose among epochs, set eval.split=val and eval.every. The
paper reports R@1 of 82.8 (texts) and 65.8 (images) on COCO's 5,000 test images for large. Hardware: TPU v5e-16 or the like.
Re-ranking keeps the tokens of all texts on every device (25,000 texts: 1.2 GB in bfloat16) and the fusion encoder's keys and
values of eval.batch_size images (10.6 MB each for large), spread over the devices.

    python -m mplug_jax.main --config=configs/retrieval.py:data=jsonl,root=/my/data

reads train.jsonl, val.jsonl and test.jsonl under `root`, a line {"image", "caption": one or a list, optionally "image_id"} for
each image.
"""

import os

from mplug_jax import config


def get_config(arg=""):
  arg = config.parse_arg(arg, data="scenes", root="", init="", res=0, steps=0, blank=False)
  c = config.defaults("retrieval", arg.size)
  c.batch_size = 64
  c.task.update({
      "queue": 4096,             # columns of past features, which the batch is compared with too
      "alpha": 0.4,              # weight of the teacher's targets, reached after
      "ramp_steps": 500,         # updates; the official first epoch
      "match": "image",          # or "row": other captions of an image are wrong
      "clamp_temperature": True,
      "negatives": {"group": 0, "greedy": False},  # rows that hard negatives are drawn from, 0: up to 64; greedy: the hardest
      "rerank_k": 32,            # candidates of every query that are re-ranked; 0: similarity alone
      "rerank_texts": 16,        # an image is matched with so many texts at a time
      "rerank_add_similarity": False,
  })
  c.ema.update({"decay": 0.995, "use": "teacher"})
  c.data.update({
      "name": arg.data, "examples": "retrieval",
      "max_words": 30, "max_caption": 30,  # words; tokens with [CLS]
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
    c.task.update({"queue": 12, "ramp_steps": 2, "rerank_k": 6, "rerank_texts": 4})
    c.eval.update({"batch_size": 8, "limit": 16})
    c.optim.schedule.warmup_steps = 1
  if arg.res:
    c.model.image_size = arg.res
  if arg.steps:
    c.total_steps = arg.steps
  if arg.init:
    # Pre-trained weights have parts that retrieval does without.
    c.init.update({"paths": (arg.init,), "unused": ("(text_decoder|fusion_encoder/mlm_head)/.*",)})
  return c.lock()


def _scenes(c, arg):
  """Scenes name sides, so nothing is mirrored, and every object counts, so nothing is cropped."""
  c.total_steps = 2000
  c.eval.limit = 500
  c.data.update({"size": arg.res or 96, "seed": 0, "difficulty": "default", "records": 64 if arg.size == "tiny" else 0,
                 "max_caption": 28})
  c.tokenizer.records = 2000     # of 20,000: few words, often repeated
  c.model.image_size = arg.res or 96


def _files(c, arg, prefix, suffix):
  """Sources read from files under `root`."""
  c.total_epochs = 8
  names = {split: os.path.join(arg.root, f"{prefix}{split}.{suffix}") for split in ("train", "val", "test")}
  c.data.update({"train_files": (names["train"],), "val_file": names["val"], "test_file": names["test"],
                 "image_root": arg.root})
  c.data.augment.scale = (0.5, 1.0)
  c.tokenizer.vocab_size = 4000  # of a fitted one


def _coco(c, arg):
  _files(c, arg, "coco_", "json")
  c.task.ramp_steps = 553        # of batches of 1,024


def _flickr30k(c, arg):
  _files(c, arg, "flickr30k_", "json")
  c.task.ramp_steps = 141


def _jsonl(c, arg):
  _files(c, arg, "", "jsonl")


_DATA = {"scenes": _scenes, "coco": _coco, "flickr30k": _flickr30k, "jsonl": _jsonl}


def _unknown(c, arg):
  raise ValueError(f"The config argument data={arg.data!r} is unknown; there are {', '.join(_DATA)}.")


def _paper(c):
  """The official fine-tuning: learning rates, schedule, batch, augmentation, queues, re-ranking."""
  c.update({"batch_size": 1024, "log_every": 50})
  c.task.update({"queue": 65536, "rerank_k": 256})
  c.data.augment.update({"scale": (0.5, 1.0), "flip": 0.5, "randaugment": (2, 7)})
  c.model.update({"dtype": "bfloat16", "remat": "full"})
  c.optim.update({"lr": 1e-5, "visual_lr": 2e-6, "groups": "official"})
  # Assigned, for `update` would keep the fields of the default schedule.
  c.optim.schedule = {"name": "official", "epochs": 8, "warmup_units": 1, "warmup_lr": 1e-5, "min_lr": 1e-6}
  c.checkpoint.every = 500
