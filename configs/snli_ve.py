"""Visual entailment: does an image entail a sentence, contradict it, or neither?

    python -m mplug_jax.main --config=configs/grounding.py
    python -m mplug_jax.main --config=configs/snli_ve.py:init=runs/grounding

trains the small preset on generated scenes, of which a sentence says how two objects stand to each other; an object that is not there
makes it neutral. Without init= it begins at random, and learns in thousands of updates what is absent, but no relation: grounding
teaches where things are. `:blank=true` shows black images instead: nothing but chance is left.

    python -m mplug_jax.main --config=configs/snli_ve.py:base,data=snli_ve,root=/data/snli_ve,init=FOLDER --config.tokenizer.path=vocab.txt

is ALBEF's recipe: 384 px, batch 256, 5 epochs, distillation from the averaged weights. It reads ve_train.json, ve_dev.json and
ve_test.json under `root`, lists of {"image", "sentence", "label"}, from `tools.prepare_data snli_ve`, and flickr30k-images/<image>.jpg.
The paper reports 89.45 (dev) and 89.29 (test) for the large model, from its pre-trained weights: convert them with
tools.convert_checkpoint for `init`.

    python -m mplug_jax.main --config=configs/snli_ve.py:data=jsonl,root=/my/data,labels=yes/no/perhaps

reads train.jsonl and val.jsonl under `root`, a line {"image", "sentence", "label"} for each example, with classes of your own. Other
formats, data=jsonl:FILE, other keys and archives: as in configs/vqa.py.
"""

import os

from mplug_jax import config


def get_config(arg=""):
  arg = config.parse_arg(
    arg, data="scenes", root="", labels="", init="", res=0, steps=0, blank=False
  )
  c = config.default_config("snli_ve", arg.size)
  classification(c, arg, images=1, labels=("contradiction", "neutral", "entailment"))
  config.choose(_DATA, arg.data)(c, arg)
  if arg.size in ("base", "large", "huge"):
    paper(c, arg.size, batch_size=256, epochs=5)
  return finish(c, arg)


def classification(c, arg, images, labels):
  """What every classification of images and a sentence needs, before its data."""
  c.task.update(
    {
      "name": "classification",
      "distill": {"alpha": 0.0, "ramp_steps": 0},  # alpha > 0 needs ema.use teacher or both
    }
  )
  c.data.update(
    {
      "name": arg.data,
      "examples": "classification",
      "images_per_text": images,
      "labels": tuple(arg.labels.split("/")) if arg.labels else labels,
      "max_words": 30,
      "max_text": 24,
      "sentences_per_row": 1,
      "swap": 0.0,
      "mirror": 0.0,  # see data/classification.py
      "strict": False,
      "blank_image": arg.blank,
      "augment": {"scale": (1.0, 1.0), "flip": 0.0, "randaugment": (), "sharpness_wraps": False},
    }
  )


def scenes(c, arg):
  """Generated scenes; the mirror image of everything keeps every label."""
  config.scenes(c, arg, steps=2500, mirror=0.5, max_text=16, easier=0.5)
  if arg.size == "small":
    config.from_scratch(c, 5e-4 if arg.init else 7e-4, 0.1)
    c.data.sentences_per_row = 4


def read_files(c, arg, train, val, test, images):
  """Examples read from json files under `root`, images from its folder `images`."""
  train, val, test, images = (os.path.join(arg.root, name) for name in (train, val, test, images))
  _files(c, train_files=(train,), val_file=val, test_file=test, image_root=images)


def own_data(c, arg):
  """One's own data: {"image" or "images", "sentence", "label", optionally "id"} for each example."""
  _files(c, **config.own_files(arg))
  c.eval.split = "val"


def _files(c, **files):
  c.total_epochs = 5
  c.data.update({"max_text": 48, **files})


def _snli_ve(c, arg):
  read_files(c, arg, "ve_train.json", "ve_dev.json", "ve_test.json", "flickr30k-images")


_DATA = {"scenes": scenes, "snli_ve": _snli_ve, "jsonl": own_data}


def paper(c, size, batch_size, epochs):
  """ALBEF's fine-tuning; mPLUG's own settings are not published."""
  config.official(
    c,
    batch_size,
    lr=2e-5,
    visual_lr=2e-5,
    epochs=epochs,
    warmup_units=1,
    warmup_lr=1e-5,
    min_lr=1e-6,
  )
  c.total_epochs = epochs
  c.task.distill.alpha = 0.4
  c.ema.update({"decay": 0.995, "use": "teacher"})
  c.data.augment.update({"scale": (0.5, 1.0), "flip": 0.5, "randaugment": (2, 7)})
  c.model.remat = "none" if size == "base" else "full"


def finish(c, arg):
  """See config.finish."""
  c.model.classes = len(c.data.labels)
  return config.finish(
    c,
    arg,
    unused="(vision_proj|text_proj|itm_head|temp|text_decoder|fusion_encoder/mlm_head)/.*",
    new=("cls_head/.*",),
  )
