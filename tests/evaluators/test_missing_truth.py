"""Evaluators on splits whose truths are absent, blank, partly known or of one image alone.

Predict functions return given results instead of a model's.
"""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from mplug_jax.data.text import wordpiece
from mplug_jax.evaluators.caption import CaptionEvaluator
from mplug_jax.evaluators.classification import ClassificationEvaluator
from mplug_jax.evaluators.grounding import GroundingEvaluator
from mplug_jax.evaluators.retrieval import RetrievalEvaluator
from mplug_jax.evaluators.vqa import VqaEvaluator
from tests.support import caption_run, tiny_run, word_list

WORDS = ("a", "red", "blue", "dog", "cat", "paris", "yes", "no", "is", "it", "what", "?", "the")
ROWS = ("index", "mask", "corrupt")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
  path.write_text(word_list.text(*WORDS))
  return wordpiece.WordPieceTokenizer(path)


@pytest.fixture
def write(tmp_path):
  """Function that writes rows, with images 0.png, 1.png, ..., as all splits; returns the folder."""

  def write(rows):
    lines = []
    for i, row in enumerate(rows):
      Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
      lines.append(json.dumps({"image": f"{i}.png"} | row) + "\n")
    for split in ("train", "val", "test"):
      (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    return tmp_path

  return write


def config(file, folder, arg="", **changes):
  changes = {"eval__split": "val", "eval__batch_size": 4, "eval__limit": 0} | changes
  return caption_run.config(f"tiny,data=jsonl,root={folder}{arg}", file, **changes)


def said(tokenizer, texts, rank):
  """Predict function that generates texts[index], in `rank` dimensions before the tokens."""

  def generate(batch):
    ids = [
      [*tokenizer.encode(texts[min(i, len(texts) - 1)]), tokenizer.eos_id] for i in batch["index"]
    ]
    tokens = np.full((len(ids), 32), tokenizer.pad_id, np.int32)
    for row, own in zip(tokens, ids):
      row[: len(own)] = own
    lengths = np.array([len(own) for own in ids])
    shape = (len(ids),) + (1,) * (rank - 1)
    return {"tokens": tokens.reshape((*shape, 32)), "length": lengths.reshape(shape)} | {
      name: batch[name] for name in ROWS
    }

  return {"generate": generate}


def warnings(caplog):
  return [record.getMessage() for record in caplog.records]


# ---- questions


def ask(write, tokenizer, rows, texts, **changes):
  folder = write([{"question": "What is it?"} | row for row in rows])
  c = config("vqa", folder, data__max_answers=10, **changes)
  evaluator = VqaEvaluator(c, tokenizer, str(folder))
  result = evaluator.run(said(tokenizer, texts, 2))
  predictions = json.loads((folder / "predictions.json").read_text())
  assert [row["answer"] for row in predictions] == texts
  return evaluator, result


def test_equal_answers_with_a_capital_are_right(write, tokenizer, caplog):
  with caplog.at_level(logging.WARNING):
    _, result = ask(write, tokenizer, [{"answer": ["Paris"] * 3}] * 4, ["paris"] * 4)
  assert result["accuracy"] == result["majority_answer"] == 100
  assert warnings(caplog) == []


def test_blank_and_absent_answers_are_no_answers(write, tokenizer, caplog):
  rows = [{"answer": given} for given in (["yes", "yes"], ["", " "], None, "", "no")]
  with caplog.at_level(logging.WARNING):
    evaluator, result = ask(write, tokenizer, rows, ["yes", "", "yes", "", "yes"])
  assert result["accuracy"] == 50
  assert warnings(caplog) == [
    "val split: 2 of 5 questions have only blank answers and are not scored: question_id 1, 3."
  ]
  assert "3 of 5 questions have no answer and are not scored." in evaluator.samples
  _, result = ask(write, tokenizer, [{"answer": ""}, {"answer": [" "]}], ["", "yes"])
  assert result == {}


def test_truths_out_of_reach_are_named_before_anything_is_computed(write, tokenizer, caplog):
  folder = write([{"question": "What?", "answer": "the red dog"}, {"question": "What?"}])
  with caplog.at_level(logging.WARNING):
    VqaEvaluator(config("vqa", folder, task__max_length=2), tokenizer, str(folder))
  (sentence,) = warnings(caplog)
  assert sentence.startswith("val split: 1 of 2 questions can never be answered right")
  assert sentence.endswith("question_id 0 ('the red dog').")


def test_an_evaluator_refuses_questions_with_one_id(write, tokenizer):
  folder = write([{"question": "What?", "answer": "dog", "question_id": 100}] * 2)
  with pytest.raises(ValueError, match="val.jsonl, line 2: question_id 100 is also that of .* 1, "):
    VqaEvaluator(config("vqa", folder), tokenizer, str(folder))
  with pytest.raises(ValueError, match="train split, question 2: question_id 100 is also that of"):
    VqaEvaluator(config("vqa", folder, eval__split="train"), tokenizer, str(folder))


# ---- captions


def describe(write, tokenizer, captions, texts):
  folder = write([{"caption": caption} for caption in captions])
  evaluator = CaptionEvaluator(config("caption", folder), tokenizer, str(folder))
  result = evaluator.run(said(tokenizer, texts, 1))
  assert len(json.loads((folder / "predictions.json").read_text())) == len(texts)
  return evaluator, result


def test_more_answers_than_training_takes_are_scored(write, tokenizer):
  answers = [*"abcdefghijkl", "dog", "dog", "dog", "dog"]
  _, result = ask(write, tokenizer, [{"answer": answers}], ["dog"])
  assert result["accuracy"] == 100


@pytest.mark.parametrize("empty", ["", "  ", "..."])
def test_empty_references_give_no_score(write, tokenizer, empty, caplog):
  with caplog.at_level(logging.WARNING):
    evaluator, result = describe(write, tokenizer, [empty, [empty, empty]], ["a dog", "a cat"])
  assert result == {}
  sentences = [
    "3 of 3 reference captions have no word and do not count, those of 2 images: '0.png', '1.png'.",
    "2 of 2 images have no reference caption and are not scored.",
  ]
  assert evaluator.samples[-2:] == sentences
  assert warnings(caplog) == ([f"val split: {s}" for s in sentences] if not empty.strip() else [])


def test_images_with_a_reference_are_scored_without_the_others(write, tokenizer):
  given = ["a red dog", ["", "the blue cat"], ""]
  evaluator, result = describe(write, tokenizer, given, ["a red dog", "the blue cat", "a dog"])
  texts = ["a red dog", "the blue cat"]
  _, same = describe(write, tokenizer, [*texts, None], [*texts, "a dog"])
  assert result["BLEU-1"] == pytest.approx(100)
  assert result["CIDEr-D"] == same["CIDEr-D"] > 100
  assert {
    "2 of 4 reference captions have no word and do not count, those of 2 images: '1.png', '2.png'.",
    "1 of 3 images have no reference caption and are not scored.",
  } <= set(evaluator.samples)


def test_one_image_alone_has_a_note_beside_its_cider(write, tokenizer):
  evaluator, result = describe(write, tokenizer, ["a red dog"], ["a red dog"])
  assert result["CIDEr-D"] == 0
  note = "CIDEr-D: CIDEr says nothing here: it is computed from one image alone"
  assert any(line.startswith(note) for line in evaluator.samples)
  evaluator, _ = describe(write, tokenizer, ["a dog", "a dog"], ["a dog", "a cat"])
  note = "CIDEr-D: CIDEr says nothing here: no n-gram of the references tells the 2 images apart"
  assert any(line.startswith(note) for line in evaluator.samples)
  evaluator, _ = describe(write, tokenizer, ["a dog", "a cat"], ["a dog", "a cat"])
  assert not any("says nothing" in line for line in evaluator.samples)


# ---- retrieval


def find(write, tokenizer, captions, features, **changes):
  """Evaluates with features {word: vector}; the features of images are given in order."""
  folder = write([{"caption": caption} for caption in captions])
  c = config("retrieval", folder, task__rerank_k=0, **changes)
  evaluator = RetrievalEvaluator(c, tokenizer, str(folder))
  texts, _ = evaluator._texts

  def embed_image(batch):
    rows = np.array([features[min(i, len(features) - 1)] for i in batch["index"]], np.float32)
    return {"feature": rows} | {name: batch[name] for name in ROWS}

  def embed_texts(batch, keep):
    rows = np.zeros((len(batch["caption"]), 2), np.float32)
    for i, text in enumerate(texts):
      rows[i] = (1, 0) if "dog" in text else (0, 1)
    return {"feature": rows}

  return evaluator, evaluator.run({"embed_image": embed_image, "embed_texts": embed_texts})


def test_empty_captions_are_no_queries(write, tokenizer, caplog):
  captions = ["a dog", ["", "a cat"], "...", " "]
  features = [(1, 0), (0, 1), (-1, -1), (-1, -1)]
  with caplog.at_level(logging.WARNING):
    evaluator, result = find(write, tokenizer, captions, features)
  assert result["txt_r1"] == result["img_r1"] == result["r_mean"] == 100
  expected = [
    "3 of 5 reference captions have no word and do not count, those of 3 images: '1.png', '2.png', "
    "'3.png'.",
    "2 of 4 images have no reference caption and are not scored.",
  ]
  assert warnings(caplog) == [f"val split: {sentence}" for sentence in expected]
  assert evaluator.samples[-2:] == expected
  # Of two texts and four images at random.
  assert result["chance_r_mean"] == pytest.approx(100 * (1 / 2 + 1 + 1 + 1 / 4 + 1 + 1) / 6)


def test_retrieval_without_a_caption_is_refused_before_training(write, tokenizer):
  folder = write([{"caption": ""}, {"caption": " . "}])
  with pytest.raises(ValueError, match="Split 'val' has no caption with a word"):
    RetrievalEvaluator(config("retrieval", folder), tokenizer, str(folder))


# ---- boxes and labels


def test_expressions_without_a_box_are_not_scored(write, tokenizer):
  folder = write([{"text": "dog", "box": [0, 0, 4, 4]}, {"text": "cat", "box": None}])
  evaluator = GroundingEvaluator(config("grounding", folder), tokenizer, str(folder))

  def locate(batch):
    boxes = np.tile(np.array([0, 0, 4, 4], np.float32), (len(batch["index"]), 1, 1))
    return {name: batch[name] for name in (*ROWS, "size")} | {
      "box": boxes,
      "nearest": boxes,
      "score": np.zeros(boxes.shape[:2], np.float32),
    }

  result = evaluator.run({"locate": locate})
  assert result["acc@0.5"] == 100
  assert evaluator.samples[-1] == "1 of 2 expressions have no box and are not scored."


def test_statements_without_a_label_are_not_scored(write, tokenizer):
  rows = [{"label": "yes"}, {"label": None}, {}]
  folder = write([{"sentence": "It is a dog."} | row for row in rows])
  c = config("snli_ve", folder, ",labels=yes/no")
  evaluator = ClassificationEvaluator(c, tokenizer, str(folder))

  def classify(batch):
    scores = np.tile(np.array([0.9, 0.1], np.float32), (len(batch["index"]), 1))
    return {name: batch[name] for name in ROWS} | {"probability": scores}

  result = evaluator.run({"classify": classify})
  assert result["accuracy"] == 100
  assert "2 of 3 statements have no label and are not scored." in evaluator.samples


@pytest.mark.parametrize("labels", ["yes/yes", "yes/", "yes/ "])
def test_labels_are_different_names(write, tokenizer, labels):
  from mplug_jax.models.factory import build_model
  from mplug_jax.tasks.classification import ClassificationTask

  c = config("snli_ve", write([]), f",labels={labels}")
  tiny_run.refused(
    lambda: ClassificationTask(build_model(c, tokenizer), c, tokenizer),
    "config.data.labels=('yes',",
    "must be different names, none of them blank",
  )
