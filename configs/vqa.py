"""Visual question answering by open-ended generation.

    python -m mplug_jax.main --config=configs/vqa.py

trains the small preset on easy-VQA (4,000 images of one shape each, from the PyPI package) from random initialisation;
see the README for the time and the accuracy to expect on two CPU cores. `:blank=true` shows black images instead, to measure
what the questions alone give away.

    python -m mplug_jax.main --config=configs/vqa.py:base,data=vqa_v2,root=/data/vqa --config.tokenizer.path=vocab.txt

is the paper's recipe: 384 px, batch 1,024, 8 epochs on VQA v2 and Visual Genome with OCR words and object labels. It reads
the official json files under `root` (vqa_train.json, vg_qa.json, vqa_val.json, vqa_test.json, images in coco/ and vg/;
other names: --config.data.train_files and so on), which `tools.prepare_data vqa_v2` makes of what VQA v2 and Visual Genome distribute;
vg=false trains without Visual Genome, data=gqa on GQA. Hardware: TPU v5e-16 or the like; on less, raise
config.optim.microbatches. The paper reports 79.79 (base) and 81.27 (large) on test-dev, starting from its pre-trained
weights: convert them with tools.convert_checkpoint and add init=FOLDER behind base.

    python -m mplug_jax.main --config=configs/vqa.py:data=jsonl,root=/my/data

reads train.jsonl and val.jsonl under `root`, a line {"image", "question", "answer"} for each question, or train.json, .csv, .tsv or
.parquet; data=jsonl:/my/data/train.csv is the same. Keys that are called otherwise: --config.data.fields=question=q,image=file. A name
of an image may lead into an archive, as photos.zip/a.jpg, and root= with data=jsonl:FILE may be one.
data=tfds:NAME,root=DATA_DIR reads a prepared set of TensorFlow Datasets: docs/shards.md.
"""

import os

from mplug_jax import config


def get_config(arg=""):
  arg = config.parse_arg(
    arg, data="easy_vqa", root="", vg=True, init="", res=0, steps=0, blank=False
  )
  c = config.default_config("vqa", arg.size)
  c.task.update(
    {
      "beams": 1,
      "min_length": 1,
      "max_length": 8,
      "beam_mode": "reference",
      "predict": "generate",  # or "rank": choose from rank_answers
      "rank_answers": (),
      "rank_top_k": 128,
      "rank_first_token_twice": True,
      "distill": {
        "alpha": 0.0,
        "ramp_steps": 0,
        "axis": "vocabulary",
      },  # alpha > 0 needs ema.use teacher or both
    }
  )
  c.data.update(
    {
      "name": arg.data,
      "examples": "vqa",
      "questions_per_image": 8,
      "max_question": 16,
      "max_answers": 1,
      "max_answer_tokens": 6,
      "add_ocr": False,
      "add_objects": False,
      "strict": False,
      "blank_image": arg.blank,
      "augment": {"scale": (1.0, 1.0), "flip": 0.5, "randaugment": (), "sharpness_wraps": False},
    }
  )
  config.choose(_DATA, arg.data)(c, arg)
  if arg.size in ("base", "large", "huge"):
    _paper(c, arg.size)
  elif arg.size == "small" and arg.data != "easy_vqa":
    config.from_scratch(c, 7e-4, 0.1)
  return config.finish(
    c, arg, unused="(vision_proj|text_proj|itm_head|temp|fusion_encoder/mlm_head)/.*"
  )


def _easy_vqa(c, arg):
  c.total_steps = 3000
  c.data.val_every = 0
  if arg.size == "small":
    config.from_scratch(c, 1e-3, 0.05)
    c.data.update({"questions_per_image": 4, "max_question": 12, "max_answer_tokens": 4})
    c.data.augment.scale = (0.7, 1.0)


def _scenes(c, arg):
  config.scenes(c, arg, steps=3000, max_question=24)
  if arg.size == "small":
    c.data.questions_per_image = 4


def _files(c, **files):
  """Sources read from files."""
  c.total_epochs = 8
  c.eval.split = "val"
  c.data.update(
    {
      "answer_list": "",  # json list of candidates, for task.predict="rank"
      "questions_per_image": 1,
      "max_question": 80,
      "max_answers": 10,
      "max_answer_tokens": 12,
      **files,
    }
  )


def _vqa_v2(c, arg):
  """The official json files; unlike the official recipe it does not train on the validation split (docs/official.md item 22)."""

  def under_root(name):
    return os.path.join(arg.root, name)

  _files(
    c,
    train_files=(under_root("vqa_train.json"), *(under_root("vg_qa.json"),) * arg.vg),
    val_file=under_root("vqa_val.json"),
    test_file=under_root("vqa_test.json"),
  )
  c.data.update(
    {
      "vqa_root": under_root("coco"),
      "vg_root": under_root("vg"),
      "gqa_root": under_root("gqa"),
      "label_file": "",
      "add_ocr": True,
      "add_objects": True,
    }
  )


def _gqa(c, arg):
  """GQA in the official json format."""
  train, val, test = (
    os.path.join(arg.root, f"gqa_{split}.json") for split in ("train", "val", "test")
  )
  _files(c, train_files=(train,), val_file=val, test_file=test, max_question=40, max_answers=1)
  c.data.update({"gqa_root": os.path.join(arg.root, "images"), "label_file": ""})


def _jsonl(c, arg):
  """One's own data: {"image", "question", "answer", optionally "question_id"} for each question."""
  _files(c, **config.own_files(arg), max_question=32)


def _tfds(c, arg):
  _files(c, **config.own_tfds(arg), max_question=32)


_DATA = {
  "easy_vqa": _easy_vqa,
  "scenes": _scenes,
  "vqa_v2": _vqa_v2,
  "jsonl": _jsonl,
  "gqa": _gqa,
  "tfds": _tfds,
}


def _paper(c, size):
  """The official fine-tuning: learning rates, schedule, batch, augmentation, beam search."""
  batch_size = 1024 if size == "base" else 2048
  config.official(
    c, batch_size, lr=3e-5, visual_lr=5e-6, epochs=8, warmup_units=4, warmup_lr=1e-5, min_lr=1e-6
  )
  c.task.update({"beams": 5, "max_length": 10})
  c.data.augment.update({"scale": (0.5, 1.0), "flip": 0.5, "randaugment": (2, 7)})
  c.model.remat = "none" if size == "base" else "full"
