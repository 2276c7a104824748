"""Pre-training: image-text contrast, matching, masked language modelling and prefix language modelling, all four at once.

    python -m mplug_jax.main --config=configs/pretrain.py

trains the small preset on generated scenes of coloured shapes from random initialisation, and reports zero-shot retrieval on 500
test scenes. `:blank=true` shows black images instead. What it leaves is a start for any other task, init=runs/pretrain.

    python -m mplug_jax.main --config=configs/pretrain.py:base,data=files,root=/data/pretrain,clip=weights/clip,bert=weights/bert \\
        --config.tokenizer.path=vocab.txt

is the paper's recipe: 256 px (large: 224), batch 1,024, 30 epochs, from the weights of CLIP and BERT that tools.convert_checkpoint
left in two folders; cross-attention and the heads are new. It reads the official json files under `root` (coco.json, vg.json, cc.json,
sbu.json; sets=coco_train/vg: others; their shares: --config.data.weights) with image names under `root`, and coco_val.json and
coco_test.json as for retrieval; `tools.prepare_data` coco_captions, visual_genome, cc and sbu write them. Hardware: TPU v5e-64 or the like;
on less, raise config.optim.microbatches: images and captions are still compared with the whole batch's.

    python -m mplug_jax.main --config=configs/pretrain.py:data=jsonl,root=/my/data

reads train.jsonl, val.jsonl and test.jsonl under `root`, a line {"image", "caption": one or a list} for each image. Other formats,
data=jsonl:FILE, other keys, archives and data=folder: as in configs/caption.py.

    python -m mplug_jax.main --config=configs/pretrain.py:base,data=shards:/data/cc3m/{00000..00331}.tar,clip=...,bert=... \\
        --config.tokenizer.path=vocab.txt --config.data.test_file=/data/pretrain/coco_test.json

reads shards of image-text pairs: tars in the WebDataset layout, or ArrayRecord, also at gs:// and the like; data=tfds:NAME reads a
prepared set of TensorFlow Datasets: docs/shards.md. Several patterns and json files mix in --config.data.train_files.
"""

import os

from configs import retrieval
from mplug_jax import config

# What neither CLIP nor BERT brings, and what they bring beyond the model.
_NEW = (
  "(text_encoder|fusion_encoder|text_decoder)/.*crossattention.*",
  "(visn_fc|visn_layer_norm|vision_proj|text_proj|itm_head|temp)/.*",
)
# What configs/retrieval.py calls it.
_DATA = {
  "scenes": "scenes",
  "files": "jsonl",
  "jsonl": "jsonl",
  "folder": "folder",
  "shards": "shards",
  "tfds": "tfds",
}


def get_config(arg=""):
  arg = config.parse_arg(
    arg,
    data="scenes",
    root="",
    sets="coco/vg/cc/sbu",
    clip="",
    bert="",
    init="",
    res=0,
    steps=0,
    blank=False,
  )
  if bool(arg.clip) != bool(arg.bert):
    raise ValueError(
      "Start from both clip=FOLDER and bert=FOLDER, from init=FOLDER, or from none of them."
    )
  source = config.choose(_DATA, arg.data) + (f":{arg.file}" if arg.file else "")
  c = config.variant(
    retrieval,
    arg,
    data=source,
    root=arg.root,
    res=arg.res,
    steps=arg.steps,
    blank=arg.blank,
  )
  c.name = "pretrain"
  c.task.update(
    {
      "name": "pretrain",
      "coefficients": {"itc": 1.0, "itm": 1.0, "mlm": 1.0, "prefix_lm": 1.0},
      "mlm_alpha": 0.4
      if arg.size in ("base", "large", "huge")
      else 0.0,  # weight of the teacher's distribution over hidden tokens
    }
  )
  c.data.update(
    {
      "name": arg.data,
      "examples": "pretrain",
      "mask_probability": 0.15,
      "whole_words": False,  # of a token, or of a word, to be hidden
      "empty_prefix": 0.0
      if arg.size in ("base", "large", "huge")
      else 0.2,  # share of captions to be told from the image alone
      "weights": (),  # shares of train_files; (): by their sizes
    }
  )
  if arg.data == "files":
    c.data.update(
      {
        "train_files": tuple(
          os.path.join(arg.root, f"{name}.json") for name in arg.sets.split("/")
        ),
        "val_file": os.path.join(arg.root, "coco_val.json"),
        "test_file": os.path.join(arg.root, "coco_test.json"),
      }
    )
  if arg.size in ("base", "large", "huge"):
    _paper(c, arg)
  elif arg.data == "scenes" and not arg.init and not arg.steps:
    c.total_steps = 3600
  paths = tuple(filter(None, (arg.clip, arg.bert) if arg.clip else (arg.init,)))
  c.init.update({"paths": paths, "new": _NEW if arg.clip else (), "unused": ()})
  return c.lock()


def _paper(c, arg):
  """The official pre-training."""
  large = arg.size != "base"
  if arg.data != "scenes":
    c.total_epochs = 30
  c.task.ramp_steps = 4000  # the official first epoch of 4 million images
  c.data.augment.scale = (0.2, 1.0)
  c.model.image_size = arg.res or (224 if large else 256)
  c.optim.update({"lr": 5e-5, "visual_lr": 5e-6} if large else {"lr": 1e-4, "visual_lr": 1e-5})
  c.optim.schedule.update(
    {"epochs": 30, "warmup_units": 20, "warmup_lr": 1e-6, "min_lr": 2e-6 if large else 1e-6}
  )
