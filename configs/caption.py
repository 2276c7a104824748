r"""Image captioning with cross-entropy.

    python -m mplug_jax.main --config=configs/caption.py

trains the small preset from random initialization on generated scenes of colored shapes (20,000
images with five captions each) and reports CIDEr-D on 1,000 test scenes. `:black_images=true`
replaces all images with black ones, to measure the score of captions that ignore their image.
configs/caption_scst.py continues from such a run.

    python -m mplug_jax.main --config.tokenizer.path=vocab.txt \
        --config=configs/caption.py:base,data=karpathy,root=/data/coco,init=FOLDER

is the paper's recipe: 384 px, batch 1,024 (docs/official.md item 51), 5 epochs with one record per
sentence, from the weights that tools.convert_checkpoint wrote to FOLDER. It reads the official JSON
files caption_train.json, caption_val.json and caption_test.json under `root`, and images in
train2014_img/ and val2014_img/, or train2014/ and val2014/. `tools.prepare_data coco_captions`
writes these files from the distributed COCO and Karpathy files. Other files:
--config.data.train_files and so on, which may all be Karpathy's dataset_coco.json. The test split
is evaluated once, at the end; to choose among epochs, set eval.split=val and eval.every. The paper
reports CIDEr 137.5 (base) and 141.0 (large). Hardware: TPU v5e-16 or similar; on less, raise
config.optim.microbatches.

    python -m mplug_jax.main --mode=evaluate --checkpoint=RUN \
        --config=configs/caption.py:base,data=nocaps,root=/data/nocaps

captions NoCaps with a trained run and scores its domains separately. It reads caption_val.json and
caption_test.json in the format of NoCaps and images/, from `tools.prepare_data nocaps`.

    python -m mplug_jax.main --config=configs/caption.py:data=jsonl,root=/my/data

reads train.jsonl, val.jsonl and test.jsonl under `root`, one line per image: {"image", "caption":
one or a list, optionally "image_id"}. Without test.jsonl, val.jsonl is evaluated. Files ending in
.json, .csv, .tsv or .parquet also work, and data=jsonl:/my/data/train.csv names one directly. Other
keys: --config.data.fields=caption=text. Image names may point into an archive, as photos.zip/a.jpg.

data=folder,root=/my/images needs no such file: it reads the images under train/, val/ and test/,
and the captions of a.jpg from a.txt, one per line. data=shards:/data/train-*.tar reads shards of
image-text pairs, data=tfds:coco_captions,root=DATA_DIR a prepared TensorFlow Datasets set:
docs/shards.md.
"""

import os

from mplug_jax import config

SOURCES = ("scenes", "karpathy", "nocaps", "jsonl", "folder", "shards", "tfds")


def get_config(arg: str = "") -> config.Config:
  """Returns the config of a captioning run."""
  options = config.parse_arg(
    arg, SOURCES, data="scenes", root="", init="", res=0, steps=0, black_images=False
  )
  c = config.default_config("caption", options.size)
  c.task.update(
    {
      "prompt": "",
      "prompt_mode": "standard",  # or "official": docs/official.md item 32
      "beams": 3,
      "min_length": 1,
      "max_length": 40,
      "beam_mode": "standard",
      "no_repeat_ngram": 0,
    }
  )
  c.data.update(
    {
      "name": options.data,
      "examples": "caption",
      # Per training record: an epoch has every caption once. 1: a record per sentence, as official.
      "captions_per_image": 5,
      "max_caption": 40,  # tokens, including [CLS], prompt and [SEP]
      "strict": False,
      "black_images": options.black_images,
      "augment": {"scale": (1.0, 1.0), "flip": 0.0, "randaugment": (), "sharpness_wraps": False},
    }
  )
  if options.data == "scenes":
    records = 64 if options.size == "tiny" else 0
    config.scenes(c, options, steps=3000, records=records, max_caption=32)
    c.task.max_length = 31
  else:
    c.total_epochs = 5
    c.tokenizer.vocab_size = 4000  # of a tokenizer fitted to the data
    c.data.update(_files(options))
    config.test_or_val(c)
  if options.data == "nocaps":
    c.eval.split = "val"  # no training split, and no captions in the test split
  if options.data == "shards":
    c.tokenizer.records = 20_000
  if options.size in config.PAPER_SIZES:
    _paper(c)
  else:
    config.from_scratch(c, 1e-3, 0.05)
  unused = "(vision_proj|text_proj|itm_head|temp|text_encoder|fusion_encoder)/.*"
  return config.finish(c, options, unused=unused)


def _files(options: config.Config) -> dict:
  """Returns the fields of config.data that name annotations and images."""
  if options.data not in ("karpathy", "nocaps"):
    return config.own_data(options)
  images = "images" if options.data == "nocaps" else ""
  return {
    **config.split_files(
      options.root, "caption_train.json", "caption_val.json", "caption_test.json"
    ),
    "image_root": os.path.join(options.root, images),
  }


def _paper(c: config.Config) -> None:
  """Sets the official learning rates, schedule, batch, augmentation and beam search."""
  # One warm-up unit: three of the official four pass in iterations that only accumulate gradients.
  config.official(
    c, 1024, lr=1e-5, visual_lr=5e-6, epochs=5, warmup_units=1, warmup_lr=1e-5, min_lr=1e-6
  )
  c.task.update({"beams": 5, "min_length": 8, "max_length": 25, "beam_mode": "reference"})
  c.data.update({"captions_per_image": 1, "max_caption": 25})
  if c.data.name != "scenes":
    c.data.augment.update({"scale": (0.5, 1.0), "flip": 0.5, "randaugment": (2, 7)})
  c.model.remat = "none" if c.model.vision_layers == 12 else "full"
