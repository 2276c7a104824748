"""A small VQA data set in the official format, with a vocabulary and configs."""

import json

import numpy as np
from PIL import Image

from tests.support import tiny_run, word_list

WORDS = [
  "is",
  "there",
  "a",
  "red",
  "blue",
  "dog",
  "cat",
  "sign",
  "what",
  "colour",
  "the",
  "stop",
  "yes",
  "no",
  "green",
  "two",
  "of",
  "it",
  "on",
  "?",
  ",",
  ".",
]


def write(folder):
  """Images, the four json files of the official format, and vocab.txt."""
  rng = np.random.default_rng(0)
  for root, names in (
    ("coco", [f"train/{i}.jpg" for i in range(6)] + [f"val/{i}.png" for i in range(3)]),
    ("vg", ["0.jpg", "1.jpg"]),
  ):
    for name in names:
      path = folder / root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256, (24 + rng.integers(20), 40, 3), np.uint8)).save(path)

  def entry(number, image, text, answers):
    extra = {} if answers is None else {"answer": answers}
    return {
      "question_id": number,
      "question": text,
      "image": image,
      "dataset": "vqa",
      "ocr": [[[0.1, 0.2], "stop"]],
      "object_label": "dog cat",
      **extra,
    }

  yes, mixed, no = ["yes"] * 10, ["yes"] * 6 + ["no", "two", "green", "no"], ["no"] * 10
  files = {
    "vqa_train.json": [
      entry(i, f"train/{i % 6}.jpg", "Is there a dog?", mixed if i % 4 == 1 else yes)
      for i in range(9)
    ],
    "vg_qa.json": [
      {
        "question_id": f"vg-{i}",
        "question": "What colour is the sign?",
        "image": f"{i}.jpg",
        "dataset": "vg",
        "answer": "yes",
      }
      for i in range(2)
    ],
    "vqa_val.json": [
      entry(100 + i, f"val/{i % 3}.png", "Is there a cat?", [yes, mixed, no][i % 3])
      for i in range(5)
    ],
    "vqa_test.json": [
      entry(200 + i, f"val/{i}.png", "Is there a red stop sign?", None) for i in range(3)
    ],
  }
  for name, entries in files.items():
    (folder / name).write_text(json.dumps(entries))
  (folder / "vocab.txt").write_text(word_list.text(*WORDS))
  return folder


def config(folder, data="vqa_v2", **changes):
  """The tiny preset on the data of `write`, a dozen updates."""
  return tiny_run.config(
    f"tiny,data={data},root={folder}",
    **{
      "tokenizer__kind": "wordpiece",
      "tokenizer__path": str(folder / "vocab.txt"),
      "compilation_cache": "",
      "data__max_question": 16,
      "data__max_answers": 4,
      "data__max_answer_tokens": 4,
      "data__augment__randaugment": (2, 7),
      "task__max_length": 3,
      "total_steps": 12,
      "optim__name": "adamw",  # compiled in half the time of Muon
      "optim__b2": 0.99,
      "optim__lr": 1e-2,
      "optim__schedule__name": "constant",
      "log_every": 4,
      "checkpoint__every": 100,
      "eval__limit": 0,
      **changes,
    },
  )
