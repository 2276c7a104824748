"""Image-text retrieval: contrastive learning and image-text matching, evaluated with re-ranking.

    python -m mplug_jax.main --config=configs/pretrain.py
    python -m mplug_jax.main --config=configs/retrieval.py:init=runs/pretrain

trains the small preset on generated scenes of coloured shapes (20,000 images with five captions each), without init= from random
initialisation, and reports recall on 500 test scenes and their 2,500 captions, beside what chance and an oracle get: several
scenes fit most captions. `:blank=true` shows black images instead.

    python -m mplug_jax.main --config=configs/retrieval.py:large,data=coco,root=/data/coco,init=FOLDER --config.tokenizer.path=vocab.txt

is the paper's recipe: 336 px (base: 384), batch 1,024, 8 epochs, queues of 65,536, the best 256 candidates re-ranked, from the weights
that tools.convert_checkpoint left in FOLDER. It reads the official json files under `root` (coco_train.json, coco_val.json,
coco_test.json; data=flickr30k: flickr30k_train.json and so on; other names: --config.data.train_files and so on) with image names under
`root`; `tools.prepare_data coco_captions` and `flickr30k` write them. It evaluates the test split once, at the end; to choose among
epochs, set eval.split=val and eval.every. The paper reports R@1 of 82.8 (texts) and 65.8 (images) on COCO's 5,000 test images for
large. Hardware: TPU v5e-16 or the like; on less, raise config.optim.microbatches: a pair
is still compared with the whole batch. Re-ranking keeps the tokens of all texts on every device (25,000 texts: 1.2 GB in bfloat16) and
the fusion encoder's keys and values of eval.batch_size images (10.6 MB each for large), spread over the devices.

    python -m mplug_jax.main --config=configs/retrieval.py:data=jsonl,root=/my/data

reads train.jsonl, val.jsonl and test.jsonl under `root`, a line {"image", "caption": one or a list, optionally "image_id"} for
each image. Other formats, data=jsonl:FILE, other keys, archives, data=folder, data=shards:PATTERN and data=tfds:NAME: as in
configs/caption.py.
"""

import os

from mplug_jax import config


def get_config(arg=""):
  arg = config.parse_arg(arg, data="scenes", root="", init="", res=0, steps=0, blank=False)
  c = config.default_config("retrieval", arg.size)
  c.batch_size = 64
  c.task.update(
    {
      "queue": 4096,  # columns of past features, which the batch is compared with too; 0: no teacher, the batch alone
      "alpha": 0.4,  # weight of the teacher's targets, reached after
      "ramp_steps": 500,  # updates; the official first epoch
      "match": "image",  # or "row": other captions of an image are wrong
      "contrast_chunk": 0,  # columns whose similarities exist at a time; 0: all
      "clamp_temperature": True,
      "negatives": {
        "group": 0,  # rows that hard negatives are drawn from, 0: up to 64
        "greedy": False,  # True: the hardest row instead of a draw
        "ramp_steps": 0,  # updates until negatives are as hard as features can find; any rows at first
      },
      "rerank_k": 32,  # candidates of every query that are re-ranked; 0: similarity alone
      "rerank_texts": 16,  # an image is matched with so many texts at a time
      "rerank_similarity": "none",  # beside the logit of a match; "add", or "likelihood": what it adds up to after hard negatives
    }
  )
  c.ema.update({"decay": 0.995, "use": "teacher"})
  c.data.update(
    {
      "name": arg.data,
      "examples": "retrieval",
      "max_words": 30,
      "max_caption": 30,  # words; tokens with [CLS]
      "strict": False,
      "blank_image": arg.blank,
      "augment": {"scale": (1.0, 1.0), "flip": 0.0, "randaugment": (), "sharpness_wraps": False},
    }
  )
  config.choose(_DATA, arg.data)(c, arg)
  if arg.size in ("base", "large", "huge"):
    _paper(c)
  else:
    config.from_scratch(c, 5e-4 if arg.init else 7e-4, 0.1)
    # Features that still change much are better compared with each other than with those of a teacher, let alone of the past.
    c.task.update({"queue": 0, "alpha": 0.0})
    c.ema.decay = 0.0
    c.task.rerank_similarity = "likelihood"
    # What only a trained model could tell apart teaches nothing: with hard negatives from the start, matching stays at chance.
    c.task.negatives.ramp_steps = 0 if arg.init else 1000
  if arg.size == "tiny":
    c.ema.decay = 0.995
    c.task.negatives.ramp_steps = 0
    c.task.update({"queue": 12, "alpha": 0.4, "ramp_steps": 2, "rerank_k": 6, "rerank_texts": 4})
  return config.finish(c, arg, unused="(text_decoder|fusion_encoder/mlm_head)/.*")


def _scenes(c, arg):
  config.scenes(
    c,
    arg,
    steps=2500 if arg.init else 2000,
    records=64 if arg.size == "tiny" else 0,
    max_caption=28,
  )
  c.eval.limit = 500


def _files(c, **files):
  """Sources read from files."""
  c.total_epochs = 8
  c.data.update(files)
  c.data.augment.scale = (0.5, 1.0)
  c.tokenizer.vocab_size = 4000  # of a fitted one


def _official(c, arg, prefix):
  train, val, test = (
    os.path.join(arg.root, f"{prefix}{split}.json") for split in ("train", "val", "test")
  )
  _files(c, train_files=(train,), val_file=val, test_file=test, image_root=arg.root)


def _coco(c, arg):
  _official(c, arg, "coco_")
  c.task.ramp_steps = 553  # of batches of 1,024


def _flickr30k(c, arg):
  _official(c, arg, "flickr30k_")
  c.task.ramp_steps = 141


def _jsonl(c, arg):
  _files(c, **config.own_files(arg))


def _folder(c, arg):
  _files(c, image_root=arg.root)


def _shards(c, arg):
  _files(c, **config.own_shards(arg))
  c.tokenizer.records = 20_000


def _tfds(c, arg):
  _files(c, **config.own_tfds(arg))


_DATA = {
  "scenes": _scenes,
  "coco": _coco,
  "flickr30k": _flickr30k,
  "jsonl": _jsonl,
  "folder": _folder,
  "shards": _shards,
  "tfds": _tfds,
}


def _paper(c):
  """The official fine-tuning: learning rates, schedule, batch, augmentation, queues, re-ranking."""
  config.official(
    c, 1024, lr=1e-5, visual_lr=2e-6, epochs=8, warmup_units=1, warmup_lr=1e-5, min_lr=1e-6
  )
  c.task.update({"queue": 65536, "rerank_k": 256})
  c.data.augment.update({"scale": (0.5, 1.0), "flip": 0.5, "randaugment": (2, 7)})
  c.model.remat = "full"
