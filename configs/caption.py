"""Image captioning by cross-entropy.

    python -m mplug_jax.main --config=configs/caption.py

trains the small preset on generated scenes of coloured shapes (20,000 images with five captions each) from random
initialisation, and reports CIDEr-D on 1,000 test scenes. `:blank=true` shows black images instead, to measure what
captions get that tell nothing of their image. configs/caption_scst.py goes on from such a run.

    python -m mplug_jax.main --config=configs/caption.py:base,data=karpathy,root=/data/coco,init=FOLDER --config.tokenizer.path=vocab.txt

is the paper's recipe: 384 px, batch 1,024 (docs/official.md item 51), 5 epochs of a record for every sentence, from the weights
that tools.convert_checkpoint left in FOLDER. It reads the official json files under `root` (caption_train.json, caption_val.json,
caption_test.json; other names: --config.data.train_files and so on, which may all be Karpathy's dataset_coco.json), images
in train2014_img/ and val2014_img/, or train2014/ and val2014/; `tools.prepare_data coco_captions` makes them of what COCO and Karpathy
distribute. It evaluates the test split once, at the end; to choose among
epochs, set eval.split=val and eval.every. The paper reports CIDEr 137.5 (base) and 141.0 (large). Hardware: TPU v5e-16 or the like;
on less, raise config.optim.microbatches.

    python -m mplug_jax.main --mode=evaluate --checkpoint=RUN --config=configs/caption.py:base,data=nocaps,root=/data/nocaps

captions NoCaps (caption_val.json, caption_test.json in its own format, images/; from `tools.prepare_data nocaps`) with a trained run,
and scores its domains apart.

    python -m mplug_jax.main --config=configs/caption.py:data=jsonl,root=/my/data

reads train.jsonl, val.jsonl and test.jsonl under `root`, a line {"image", "caption": one or a list, optionally "image_id"} for
each image, or train.json, .csv, .tsv or .parquet; data=jsonl:/my/data/train.csv is the same. Keys that are called otherwise:
--config.data.fields=caption=text. A name of an image may lead into an archive, as photos.zip/a.jpg. data=folder,root=/my/images needs
no such file: it reads the images under train/, val/ and test/, and the captions of a.jpg from a.txt, one a line.
data=shards:/data/train-*.tar reads shards of image-text pairs, data=tfds:coco_captions,root=DATA_DIR a prepared set of TensorFlow
Datasets: docs/shards.md.
"""

import os

from mplug_jax import config


def get_config(arg=""):
  arg = config.parse_arg(arg, data="scenes", root="", init="", res=0, steps=0, blank=False)
  c = config.default_config("caption", arg.size)
  c.task.update(
    {
      "prompt": "",
      "prompt_mode": "mended",  # or "official": docs/official.md item 32
      "beams": 3,
      "min_length": 1,
      "max_length": 40,
      "beam_mode": "standard",
      "no_repeat_ngram": 0,
    }
  )
  c.data.update(
    {
      "name": arg.data,
      "examples": "caption",
      "captions_per_image": 5,  # of a training record: an epoch has every caption once; 1: a record a sentence, as official
      "max_caption": 40,  # tokens, [CLS], prompt and [SEP] included
      "strict": False,
      "blank_image": arg.blank,
      "augment": {"scale": (1.0, 1.0), "flip": 0.0, "randaugment": (), "sharpness_wraps": False},
    }
  )
  config.choose(_DATA, arg.data)(c, arg)
  if arg.size in ("base", "large", "huge"):
    _paper(c)
  else:
    config.from_scratch(c, 1e-3, 0.05)
  return config.finish(
    c, arg, unused="(vision_proj|text_proj|itm_head|temp|text_encoder|fusion_encoder)/.*"
  )


def _scenes(c, arg):
  config.scenes(c, arg, steps=3000, records=64 if arg.size == "tiny" else 0, max_caption=32)
  c.task.max_length = 31


def _files(c, **files):
  """Sources read from files."""
  c.total_epochs = 5
  c.data.update(files)
  c.tokenizer.vocab_size = 4000  # of a fitted one


def _karpathy(c, arg, images=""):
  train, val, test = (
    os.path.join(arg.root, f"caption_{split}.json") for split in ("train", "val", "test")
  )
  _files(
    c, train_files=(train,), val_file=val, test_file=test, image_root=os.path.join(arg.root, images)
  )


def _nocaps(c, arg):
  """Also other data in the format of COCO captions. NoCaps has no training split, and its test split no captions."""
  _karpathy(c, arg, "images")
  c.eval.split = "val"


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
  "karpathy": _karpathy,
  "nocaps": _nocaps,
  "jsonl": _jsonl,
  "folder": _folder,
  "shards": _shards,
  "tfds": _tfds,
}


def _paper(c):
  """The official fine-tuning: learning rates, schedule, batch, augmentation, beam search."""
  # One unit of warm-up: of the official four, three pass in iterations that only accumulate.
  config.official(
    c, 1024, lr=1e-5, visual_lr=5e-6, epochs=5, warmup_units=1, warmup_lr=1e-5, min_lr=1e-6
  )
  c.task.update({"beams": 5, "min_length": 8, "max_length": 25, "beam_mode": "reference"})
  c.data.update({"captions_per_image": 1, "max_caption": 25})
  if c.data.name != "scenes":
    c.data.augment.update({"scale": (0.5, 1.0), "flip": 0.5, "randaugment": (2, 7)})
  c.model.remat = "none" if c.model.vision_layers == 12 else "full"
