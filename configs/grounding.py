r"""Visual grounding: predicts the box of the object that a phrase describes.

    python -m mplug_jax.main --config=configs/grounding.py

trains the small preset from random initialization on generated scenes and reports the share of
boxes whose overlap with the true box is at least one half, on scenes of the test split.
`:black_images=true` replaces all images with black ones, to measure the accuracy from the phrases
only; the score of a constant box, printed with the result, is another lower bound.

    python -m mplug_jax.main --config.tokenizer.path=vocab.txt \
        --config=configs/grounding.py:large,data=transvg,dataset=vg_uni,root=/data/vg

is the first stage of the paper's recipe: 336 px, batch 192, 120 epochs on the union of ReferIt,
RefCOCO, RefCOCO+ and RefCOCOg. It reads the official lists under `root`/data
(data/unc/unc_train.pth and so on) and the images under `root`/ln_data (in
other/images/mscoco/images/train2014 and referit/images). The second stage starts from the first,
with dataset=unc, unc+ or gref_umd, init=RUN after large, and

    --config.optim.lr=2e-6 --config.optim.visual_lr=2e-6 --config.data.test_name=testA

(or testB; for gref_umd: test).

Some test images of one data set are training images of another; the official recipe does not remove
them. The official code updates on every fourth batch only (docs/official.md item 12), so its 120
epochs equal about 30 here: set total_epochs. The paper reports 92.40 / 94.51 / 88.42 (RefCOCO val,
testA, testB) for large, from its pre-trained weights: convert them with tools.convert_checkpoint
and add init=FOLDER. Hardware: TPU v5e-16 or similar; on less, raise config.optim.microbatches.

    python -m mplug_jax.main --config=configs/grounding.py:data=jsonl,root=/my/data

reads train.jsonl and val.jsonl under `root`, one line per phrase: {"image", "text", "box": [x1, y1,
x2, y2]} in pixels. Other formats, data=jsonl:FILE, other keys and archives: see configs/vqa.py.

data=refcoco reads train.json, val.json and test.json (with test=testA: testA.json), lists of
{"image", "bbox": [x, y, width, height], "sentences": [...]}, which `tools.prepare_data refcoco`
writes from the files of the REFER tool. data=tfds:ref_coco/refcoco_unc,root=DATA_DIR,test=testA
reads a prepared TensorFlow Datasets set: docs/shards.md.
"""

import os

from mplug_jax import config

SOURCES = ("scenes", "transvg", "jsonl", "refcoco", "tfds")
_SIDES = tuple((21 - i) / 21 for i in range(7))  # 336, 320, ..., 240 pixels of a canvas of 336


def get_config(arg: str = "") -> config.Config:
  """Returns the config of a grounding run."""
  options = config.parse_arg(
    arg,
    SOURCES,
    data="scenes",
    dataset="unc",
    test="",
    root="",
    init="",
    res=0,
    steps=0,
    black_images=False,
  )
  c = config.default_config("grounding", options.size)
  c.task.update(
    {
      "bins": {"tiny": 96, "small": 32}.get(options.size, 336),
      "rounding": "down",  # of coordinates to bins, as official; or "nearest"
      "box_weights": "per_example",  # or "batch", as the official code computes them, or "none"
      "eval_normalization": "clip",  # or "imagenet", as the official evaluation
    }
  )
  c.tokenizer.locations = c.task.bins + 1
  c.data.update(
    {
      "name": options.data,
      "examples": "grounding",
      "expressions_per_image": 1,
      "max_phrase": 20,
      "strict": False,
      "black_images": options.black_images,
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
  _data(c, options)
  if options.size in config.PAPER_SIZES:
    _paper(c, options.size)
  else:
    config.from_scratch(c, 7e-4, 0.1)
    # Weights that shrink as boxes improve slow training down, and half a wide bin is a large error.
    c.task.update({"box_weights": "none", "rounding": "nearest"})
  unused = "(vision_proj|text_proj|itm_head|temp|fusion_encoder/mlm_head)/.*"
  return config.finish(c, options, unused=unused)


def _data(c: config.Config, options: config.Config) -> None:
  """Sets the fields of one data source."""
  if options.data == "scenes":
    config.scenes(c, options, steps=3000, expressions_per_image=4, max_phrase=22)
    if options.size == "tiny":
      c.data.size = c.model.image_size = options.res or 48
    # Phrases mention sizes and places, and every scene is new: mirroring is the only augmentation.
    c.data.augment.update({"long_sides": (1.0,), "crop": 0.0, "jitter": 0.0})
    return
  c.total_epochs = 120 if options.size in config.PAPER_SIZES else 20
  c.eval.split = "val"
  if options.data == "transvg":  # lists of TransVG, which the official code reads
    test = "testA" if options.dataset in ("unc", "unc+", "vg_uni") else "test"
    c.data.update(
      {
        "dataset": options.dataset,
        "split_root": os.path.join(options.root, "data"),
        "image_root": os.path.join(options.root, "ln_data"),
        "test_name": options.test or test,
      }
    )
  elif options.data == "refcoco":
    test = f"{options.test or 'test'}.json"
    c.data.update(config.split_files(options.root, "train.json", "val.json", test))
    c.data.image_root = os.path.join(options.root, "")
  else:
    c.data.update(config.own_data(options))
  if options.data == "tfds" and options.test:  # RefCOCO and RefCOCO+ have splits testA and testB
    c.data.splits = (*c.data.splits[:2], options.test)


def _paper(c: config.Config, size: str) -> None:
  """Sets the official learning rates, schedule and batch, in float32 as there."""
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
  c.model.image_size = 384 if size == "base" else 336
  c.model.remat = "none" if size == "base" else "full"
  c.optim.clip = 0.0
