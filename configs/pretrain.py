r"""Pre-training with four objectives: contrastive, matching, masked and prefix language modeling.

    python -m mplug_jax.main --config=configs/pretrain.py

trains the small preset from random initialization on generated scenes of colored shapes, and
reports zero-shot retrieval on 500 test scenes. `:black_images=true` replaces all images with black
ones. Any other task can start from the result with init=runs/pretrain.

    python -m mplug_jax.main --config.tokenizer.path=vocab.txt \
        --config=configs/pretrain.py:base,data=files,root=/data/pretrain,clip=w/clip,bert=w/bert

is the paper's recipe: 256 px (large: 224), batch 1,024, 30 epochs, from the weights of CLIP and
BERT that tools.convert_checkpoint wrote to two folders; cross-attention and the heads are new. It
reads the official JSON files coco.json, vg.json, cc.json and sbu.json under `root` (others:
sets=coco_train/vg; their shares: --config.data.weights) with image names under `root`, and
coco_val.json and coco_test.json as for retrieval; `tools.prepare_data` coco_captions,
visual_genome, cc and sbu write them. Hardware: TPU v5e-64 or similar; on less, raise
config.optim.microbatches: images and captions are still compared with those of the whole batch.

    python -m mplug_jax.main --config=configs/pretrain.py:data=jsonl,root=/my/data

reads train.jsonl, val.jsonl and test.jsonl under `root`, one line per image: {"image", "caption":
one or a list}. Other formats, data=jsonl:FILE, other keys, archives and data=folder: see
configs/caption.py.

    python -m mplug_jax.main --config.tokenizer.path=vocab.txt \
        --config.data.test_file=/data/pretrain/coco_test.json \
        --config=configs/pretrain.py:base,data=shards:/data/cc/{00000..00331}.tar,clip=...,bert=...

reads shards of image-text pairs: tar files in the WebDataset layout, or ArrayRecord files, also
from gs:// and similar. data=tfds:NAME reads a prepared TensorFlow Datasets set: docs/shards.md.
--config.data.train_files may mix several patterns and JSON files.
"""

import os

from configs import retrieval
from mplug_jax import config

SOURCES = ("scenes", "files", "jsonl", "folder", "shards", "tfds")
# Parameters that neither CLIP nor BERT has.
_NEW = (
  "(text_encoder|fusion_encoder|text_decoder)/.*crossattention.*",
  "(visn_fc|visn_layer_norm|vision_proj|text_proj|itm_head|temp)/.*",
)


def get_config(arg: str = "") -> config.Config:
  """Returns the config of a pre-training run."""
  options = config.parse_arg(
    arg,
    SOURCES,
    data="scenes",
    root="",
    sets="coco/vg/cc/sbu",
    clip="",
    bert="",
    init="",
    res=0,
    steps=0,
    black_images=False,
  )
  if bool(options.clip) != bool(options.bert):
    raise ValueError(
      "Start from both clip=FOLDER and bert=FOLDER, from init=FOLDER, or from none of them."
    )
  paper = options.size in config.PAPER_SIZES
  c = config.variant(
    retrieval,
    options,
    data=_retrieval_source(options),
    root=options.root,
    res=options.res,
    steps=options.steps,
    black_images=options.black_images,
  )
  c.name = "pretrain"
  c.task.update(
    {
      "name": "pretrain",
      "coefficients": {"itc": 1.0, "itm": 1.0, "mlm": 1.0, "prefix_lm": 1.0},
      "mlm_alpha": 0.4 if paper else 0.0,  # weight of the teacher's distribution over hidden tokens
    }
  )
  c.data.update(
    {
      "name": options.data,
      "examples": "pretrain",
      "mask_probability": 0.15,  # of hiding a token, or a word
      "whole_words": False,
      "empty_prefix": 0.0 if paper else 0.2,  # share of captions generated from the image only
      "weights": (),  # shares of train_files; (): by their sizes
    }
  )
  if options.data == "files":
    c.data.update(_official_files(options))
    c.eval.split = "test"
  if paper:
    _paper(c, options)
  elif options.data == "scenes" and not options.init and not options.steps:
    c.total_steps = 3600
  c.init.update({"paths": (options.init,) if options.init else (), "new": (), "unused": ()})
  if options.clip:
    c.init.update({"paths": (options.clip, options.bert), "new": _NEW})
  return c.lock()


def _retrieval_source(options: config.Config) -> str:
  """Returns the data source of configs/retrieval.py whose settings are shared."""
  source = "jsonl" if options.data == "files" else options.data
  return f"{source}:{options.file}" if options.file else source


def _official_files(options: config.Config) -> dict:
  """Returns the fields of config.data for the official JSON files."""
  names = [f"{name}.json" for name in options.sets.split("/")]
  return {
    "train_files": tuple(os.path.join(options.root, name) for name in names),
    "val_file": os.path.join(options.root, "coco_val.json"),
    "test_file": os.path.join(options.root, "coco_test.json"),
  }


def _paper(c: config.Config, options: config.Config) -> None:
  """Sets the official pre-training recipe."""
  large = options.size != "base"
  if options.data != "scenes":
    c.total_epochs = 30
  c.task.ramp_steps = 4000  # the official first epoch of 4 million images
  c.data.augment.scale = (0.2, 1.0)
  c.model.image_size = options.res or (224 if large else 256)
  c.model.remat = "full" if options.size == "huge" else "none"
  c.optim.update({"lr": 5e-5, "visual_lr": 5e-6} if large else {"lr": 1e-4, "visual_lr": 1e-5})
  c.optim.schedule.update(
    {"epochs": 30, "warmup_units": 20, "warmup_lr": 1e-6, "min_lr": 2e-6 if large else 1e-6}
  )
