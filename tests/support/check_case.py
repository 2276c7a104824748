"""Images, questions and calls of `tools.prepare_data check` for its tests."""

import json

import numpy as np
from PIL import Image

from tools import prepare_data

VOCABULARY = [
  "[PAD]",
  "[UNK]",
  "[CLS]",
  "[SEP]",
  "[MASK]",
  "a",
  "red",
  "blue",
  "dog",
  "cat",
  "two",
  "what",
  "is",
  "it",
  "?",
  "yes",
  "no",
]


def fill(folder):
  """Writes twelve images, 20 pixels high and from 30 to 41 wide, and a vocabulary."""
  rng = np.random.default_rng(0)
  for i in range(12):
    Image.fromarray(rng.integers(0, 256, (20, 30 + i, 3), np.uint8)).save(folder / f"{i}.png")
  (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")


def write(folder, rows, name="train.jsonl"):
  (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(folder / name)


def questions(count=12, **changes):
  return [
    {
      "question_id": 100 + i,
      "image": f"{i}.png",
      "question": "What is it?",
      "answer": ["a dog", "a dog", f"cat {i}"],
      **changes,
    }
    for i in range(count)
  ]


def check(capsys, *arguments):
  """Returns (exit status, printed lines, stderr)."""
  status = prepare_data.main(["check", *map(str, arguments)])
  printed = capsys.readouterr()
  return status, printed.out.splitlines(), printed.err
