"""Visual grounding: the box of the object that a phrase means.

    python -m mplug_jax.main --config=configs/grounding.py

trains the small preset on generated scenes from random initialisation and reports the share of boxes that overlap the true one
by half or more, on scenes of the test split. `:blank=true` shows black images instead, to measure what the phrases alone give
away; the constant box printed beside the result needs neither.

    python -m mplug_jax.main --config=configs/grounding.py:large,data=transvg,dataset=vg_uni,root=/data/vg \\
        --config.tokenizer.path=vocab.txt

is the first stage of the paper's recipe: 336 px, batch 192, 120 epochs on the union of ReferIt, RefCOCO, RefCOCO+ and RefCOCOg. It
reads the official lists under `root`/data (data/unc/unc_train.pth and so on) and the images under `root`/ln_data (in
other/images/mscoco/images/train2014 and referit/images). The second stage starts from it, with dataset=unc, unc+ or gref_umd,
init=RUN behind large, and

    --config.optim.lr=2e-6 --config.optim.visual_lr=2e-6 --config.data.test_name=testA   (testB; test for gref_umd)

Some test images of one data set are training images of another; the official recipe does not remove them. The official code
makes an update of every fourth batch only (docs/official.md item 12), so its 120 epochs are about 30 here: total_epochs. The
paper reports 92.40 / 94.51 / 88.42 (RefCOCO val, testA, testB) for large, starting from its pre-trained weights: convert them
with tools.convert_checkpoint and add init=FOLDER. Hardware: TPU v5e-16 or the like; on less, raise config.optim.microbatches.

    python -m mplug_jax.main --config=configs/grounding.py:data=jsonl,root=/my/data

reads train.jsonl and val.jsonl under `root`, a line {"image", "text", "box": [x1, y1, x2, y2]} in pixels for each phrase (other
formats, data=jsonl:FILE, other keys and archives: as in configs/vqa.py);
data=refcoco reads train.json, val.json and, with test=testA, testA.json (default test.json), lists of {"image", "bbox": [x, y, width,
height], "sentences": [...]}, which `tools.prepare_data refcoco` makes of the files of the REFER tool;
data=tfds:ref_coco/refcoco_unc,root=DATA_DIR,test=testA reads a prepared set of TensorFlow Datasets: docs/shards.md.
"""

import os

from mplug_jax import config

_SIDES = tuple((21 - i) / 21 for i in range(7))  # 336, 320, ..., 240 pixels of a canvas of 336


def get_config(arg=""):
  arg = config.parse_arg(
    arg, data="scenes", dataset="unc", test="", root="", init="", res=0, steps=0, blank=False
  )
  c = config.default_config("grounding", arg.size)
  c.task.update(
    {
      "bins": {"tiny": 96, "small": 32}.get(arg.size, 336),
      "rounding": "down",  # of coordinates to bins, as official; or "nearest"
      "box_weights": "own",  # or "batch", as the official code computes them, or "none"
      "eval_normalisation": "clip",  # "imagenet": as the official evaluation
    }
  )
  c.tokenizer.locations = c.task.bins + 1
  c.data.update(
    {
      "name": arg.data,
      "examples": "grounding",
      "expressions_per_image": 1,
      "max_phrase": 20,
      "strict": False,
      "blank_image": arg.blank,
      "augment": {
        "long_sides": _SIDES,
        "crop": 0.5,
        "official_crop": False,
        "jitter": 0.8,
        "flip": 0.5,
        "position_words": ("left", "right", "top", "bottom", "middle"),
        "official_words": False,
      },
    }
  )
  config.choose(_DATA, arg.data)(c, arg)
  if arg.size in ("base", "large", "huge"):
    _paper(c, arg.size)
  else:
    _small(c)
  return config.finish(
    c, arg, unused="(vision_proj|text_proj|itm_head|temp|fusion_encoder/mlm_head)/.*"
  )


def _small(c):
  """From random initialisation on two CPU cores."""
  config.from_scratch(c, 7e-4, 0.1)
  # Weights that fade as boxes get right slow it down, and half of a wide bin is much.
  c.task.update({"box_weights": "none", "rounding": "nearest"})


def _scenes(c, arg):
  config.scenes(c, arg, steps=3000, expressions_per_image=4, max_phrase=22)
  if arg.size == "tiny":
    c.data.size = c.model.image_size = arg.res or 48
  # Sizes and places are what the phrases speak of, and every scene is new: mirroring is all that is done to it.
  c.data.augment.update({"long_sides": (1.0,), "crop": 0.0, "jitter": 0.0})


def _files(c, arg):
  """Sources read from files under `root`."""

  def under_root(name):
    return os.path.join(arg.root, name)

  c.total_epochs = 120 if arg.size in ("base", "large", "huge") else 20
  c.eval.split = "val"
  return under_root


def _transvg(c, arg):
  """The lists of TransVG, which the official code reads."""
  under_root = _files(c, arg)
  c.data.update(
    {
      "dataset": arg.dataset,
      "split_root": under_root("data"),
      "image_root": under_root("ln_data"),
      "test_name": arg.test or ("testA" if arg.dataset in ("unc", "unc+", "vg_uni") else "test"),
    }
  )


def _jsonl(c, arg):
  """One's own data: {"image", "text", "box", optionally "id"} for each phrase."""
  _files(c, arg)
  c.data.update(config.own_files(arg))


def _refcoco(c, arg):
  """Json lists of {"image" or "file_name", "bbox", "sentences"}."""
  under_root = _files(c, arg)
  c.data.update(
    {
      "train_files": (under_root("train.json"),),
      "val_file": under_root("val.json"),
      "test_file": under_root(f"{arg.test or 'test'}.json"),
      "image_root": under_root(""),
    }
  )


def _tfds(c, arg):
  """A prepared set of TensorFlow Datasets; RefCOCO and RefCOCO+ have the splits testA and testB."""
  _files(c, arg)
  train, val, test = config.own_tfds(arg)["splits"]
  c.data.update({**config.own_tfds(arg), "splits": (train, val, arg.test or test)})


_DATA = {
  "scenes": _scenes,
  "transvg": _transvg,
  "jsonl": _jsonl,
  "refcoco": _refcoco,
  "tfds": _tfds,
}


def _paper(c, size):
  """The official fine-tuning: learning rates, schedule, batch, in float32 as there."""
  config.official(
    c,
    192,
    lr=2e-5,
    visual_lr=5e-6,
    dtype="float32",
    epochs=120,
    warmup_units=20,
    warmup_lr=1e-6,
    min_lr=1e-6,
  )
  c.model.update(
    {"image_size": 336 if size != "base" else 384, "remat": "none" if size == "base" else "full"}
  )
  c.optim.clip = 0.0
