r"""Visual question answering by open-ended generation.

    python -m mplug_jax.main --config=configs/vqa.py

trains the small preset from random initialization on easy-VQA (4,000 images of one shape each, from
the PyPI package); the README lists time and accuracy on two CPU cores. `:black_images=true`
replaces all images with black ones, to measure the accuracy from the questions only.

    python -m mplug_jax.main --config.tokenizer.path=vocab.txt \
        --config=configs/vqa.py:base,data=vqa_v2,root=/data/vqa

is the paper's recipe: 384 px, batch 1,024, 8 epochs on VQA v2 and Visual Genome with OCR words and
object labels. It reads the official JSON files vqa_train.json, vg_qa.json, vqa_val.json and
vqa_test.json under `root`, and images in coco/ and vg/; `tools.prepare_data vqa_v2` writes the
files from the distributed files of VQA v2 and Visual Genome. Other names: --config.data.train_files
and so on. vg=false trains without Visual Genome, data=gqa on GQA. Hardware: TPU v5e-16 or similar;
on less, raise config.optim.microbatches. The paper reports 79.79 (base) and 81.27 (large) on
test-dev, from its pre-trained weights: convert them with tools.convert_checkpoint and add
init=FOLDER after base.

    python -m mplug_jax.main --config=configs/vqa.py:data=jsonl,root=/my/data

reads train.jsonl and val.jsonl under `root`, one line per question: {"image", "question",
"answer"}. Files ending in .json, .csv, .tsv or .parquet also work, and
data=jsonl:/my/data/train.csv names one directly. Other keys:
--config.data.fields=question=q,image=file. Image names may point into an archive, as
photos.zip/a.jpg, and with data=jsonl:FILE root= may be an archive.

data=tfds:NAME,root=DATA_DIR reads a prepared TensorFlow Datasets set: docs/shards.md.
"""

import os

from mplug_jax import config

SOURCES = ("easy_vqa", "scenes", "vqa_v2", "jsonl", "gqa", "tfds")


def get_config(arg: str = "") -> config.Config:
  """Returns the config of a question answering run."""
  options = config.parse_arg(
    arg, SOURCES, data="easy_vqa", root="", vg=True, init="", res=0, steps=0, black_images=False
  )
  c = config.default_config("vqa", options.size)
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
      # alpha > 0 needs ema.use teacher or both.
      "distill": {"alpha": 0.0, "ramp_steps": 0, "axis": "vocabulary"},
    }
  )
  c.data.update(
    {
      "name": options.data,
      "examples": "vqa",
      "questions_per_image": 8,
      "max_question": 16,
      "max_answers": 1,
      "max_answer_tokens": 6,
      "add_ocr": False,
      "add_objects": False,
      "strict": False,
      "black_images": options.black_images,
      "augment": {"scale": (1.0, 1.0), "flip": 0.5, "randaugment": (), "sharpness_wraps": False},
    }
  )
  if options.data == "easy_vqa":
    _easy_vqa(c, options.size)
  elif options.data == "scenes":
    config.scenes(c, options, steps=3000, max_question=24)
    if options.size == "small":
      c.data.questions_per_image = 4
  else:
    _files(c, options)
  if options.size in config.PAPER_SIZES:
    _paper(c, options.size)
  elif options.size == "small" and options.data != "easy_vqa":
    config.from_scratch(c, 7e-4, 0.1)
  unused = "(vision_proj|text_proj|itm_head|temp|fusion_encoder/mlm_head)/.*"
  return config.finish(c, options, unused=unused)


def _easy_vqa(c: config.Config, size: str) -> None:
  """Sets training on easy-VQA."""
  c.total_steps = 3000
  c.data.val_every = 0
  if size == "small":
    config.from_scratch(c, 1e-3, 0.05)
    c.data.update({"questions_per_image": 4, "max_question": 12, "max_answer_tokens": 4})
    c.data.augment.scale = (0.7, 1.0)


def _files(c: config.Config, options: config.Config) -> None:
  """Sets training on annotation files or a prepared TensorFlow Datasets set."""
  c.total_epochs = 8
  c.eval.split = "val"
  c.data.update(
    {
      "answer_list": "",  # JSON list of candidates, for task.predict="rank"
      "questions_per_image": 1,
      "max_question": 32,
      "max_answers": 10,
      "max_answer_tokens": 12,
    }
  )
  root = options.root
  if options.data == "vqa_v2":
    # The official recipe also trains on the validation split (docs/official.md item 22).
    c.data.update(config.split_files(root, "vqa_train.json", "vqa_val.json", "vqa_test.json"))
    # The benchmark's evaluation script; "2017" is that of the official code and of published
    # validation accuracies (docs/official.md item 62).
    c.eval.vqa_script = "2021"
    if options.vg:
      c.data.train_files += (os.path.join(root, "vg_qa.json"),)
    c.data.update(
      {
        "vqa_root": os.path.join(root, "coco"),
        "vg_root": os.path.join(root, "vg"),
        "gqa_root": os.path.join(root, "gqa"),
        "label_file": "",
        "max_question": 80,
        "add_ocr": True,
        "add_objects": True,
      }
    )
  elif options.data == "gqa":
    c.data.update(config.split_files(root, "gqa_train.json", "gqa_val.json", "gqa_test.json"))
    c.data.update(
      {
        "gqa_root": os.path.join(root, "images"),
        "label_file": "",
        "max_question": 40,
        "max_answers": 1,
      }
    )
  else:
    c.data.update(config.own_data(options))


def _paper(c: config.Config, size: str) -> None:
  """Sets the official learning rates, schedule, batch, augmentation and beam search."""
  batch_size = 1024 if size == "base" else 2048
  config.official(
    c, batch_size, lr=3e-5, visual_lr=5e-6, epochs=8, warmup_units=4, warmup_lr=1e-5, min_lr=1e-6
  )
  c.task.update({"beams": 5, "max_length": 10})
  c.data.augment.update({"scale": (0.5, 1.0), "flip": 0.5, "randaugment": (2, 7)})
  c.model.remat = "none" if size == "base" else "full"
