r"""Visual entailment: does an image entail a sentence, contradict it, or neither?

    python -m mplug_jax.main --config=configs/grounding.py
    python -m mplug_jax.main --config=configs/snli_ve.py:init=runs/grounding

train the small preset on generated scenes. A sentence describes the relative position of two
objects; a missing object makes it neutral. From random initialization, without init=, thousands of
updates teach absence but no relation: grounding teaches where objects are. `:black_images=true`
replaces all images with black ones: accuracy is then at chance.

    python -m mplug_jax.main --config.tokenizer.path=vocab.txt \
        --config=configs/snli_ve.py:base,data=snli_ve,root=/data/snli_ve,init=FOLDER

is ALBEF's recipe: 384 px, batch 256, 5 epochs, distillation from the averaged weights. It reads
ve_train.json, ve_dev.json and ve_test.json under `root`, lists of {"image", "sentence", "label"},
from `tools.prepare_data snli_ve`, and flickr30k-images/<image>.jpg. The paper reports 89.45 (dev)
and 89.29 (test) for the large model, from its pre-trained weights: convert them with
tools.convert_checkpoint for `init`.

    python -m mplug_jax.main \
        --config=configs/snli_ve.py:data=jsonl,root=/my/data,labels=yes/no/perhaps

reads train.jsonl and val.jsonl under `root`, one line per example: {"image", "sentence", "label"},
with your own classes. Other formats, data=jsonl:FILE, other keys and archives: see configs/vqa.py.
"""

import os

from mplug_jax import config

SOURCES = ("scenes", "snli_ve", "jsonl")


def get_config(arg: str = "") -> config.Config:
  """Returns the config of a visual entailment run."""
  options = config.parse_arg(
    arg, SOURCES, data="scenes", root="", labels="", init="", res=0, steps=0, black_images=False
  )
  c = config.default_config("snli_ve", options.size)
  classification(c, options, images=1, labels=("contradiction", "neutral", "entailment"))
  if options.data == "scenes":
    scenes(c, options)
  elif options.data == "snli_ve":
    read_files(c, options, "ve_train.json", "ve_dev.json", "ve_test.json", "flickr30k-images")
  else:
    own_data(c, options)
  if options.size in config.PAPER_SIZES:
    paper(c, options.size, batch_size=256, epochs=5)
  return finish(c, options)


def classification(
  c: config.Config, options: config.Config, images: int, labels: tuple[str, ...]
) -> None:
  """Sets the task and data fields of any classification of images and a sentence.

  Args:
    c: config to change.
    options: result of `config.parse_arg`.
    images: number of images of an example.
    labels: class names, unless options.labels has others.
  """
  c.task.update(
    {
      "name": "classification",
      "distill": {"alpha": 0.0, "ramp_steps": 0},  # alpha > 0 needs ema.use teacher or both
    }
  )
  c.data.update(
    {
      "name": options.data,
      "examples": "classification",
      "images_per_text": images,
      "labels": tuple(options.labels.split("/")) if options.labels else labels,
      "max_words": 30,
      "max_text": 24,
      "sentences_per_row": 1,
      "swap": 0.0,
      "mirror": 0.0,  # see mplug_jax/data/examples/classification.py
      "strict": False,
      "black_images": options.black_images,
      "augment": {"scale": (1.0, 1.0), "flip": 0.0, "randaugment": (), "sharpness_wraps": False},
    }
  )


def scenes(c: config.Config, options: config.Config) -> None:
  """Sets training on generated scenes; mirroring images and words keeps every label."""
  config.scenes(c, options, steps=2500, mirror=0.5, max_text=16, easy_fraction=0.5)
  if options.size == "small":
    config.from_scratch(c, 5e-4 if options.init else 7e-4, 0.1)
    c.data.sentences_per_row = 4


def read_files(
  c: config.Config, options: config.Config, train: str, val: str, test: str, images: str
) -> None:
  """Sets training on JSON files under options.root, with images in its folder `images`."""
  c.total_epochs = 5
  c.data.update(config.split_files(options.root, train, val, test))
  c.data.update({"image_root": os.path.join(options.root, images), "max_text": 48})


def own_data(c: config.Config, options: config.Config) -> None:
  """Sets training on lines of {"image" or "images", "sentence", "label", optionally "id"}."""
  c.total_epochs = 5
  c.eval.split = "val"
  c.data.update({**config.own_data(options), "max_text": 48})


def paper(c: config.Config, size: str, batch_size: int, epochs: int) -> None:
  """Sets ALBEF's fine-tuning recipe; those of mPLUG are not published."""
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


def finish(c: config.Config, options: config.Config) -> config.Config:
  """Applies the tiny size and the config argument; called last."""
  c.model.classes = len(c.data.labels)
  unused = "(vision_proj|text_proj|itm_head|temp|text_decoder|fusion_encoder/mlm_head)/.*"
  return config.finish(c, options, unused=unused, new=("cls_head/.*",))
