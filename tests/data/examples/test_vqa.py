"""VQA examples against literal tokens, and easy-VQA through the whole pipeline."""

import collections
import pickle

import numpy as np
import pytest
from absl import logging
from PIL import Image

from mplug_jax.data import pipeline
from mplug_jax.data.errors import ImageError, RecordError
from mplug_jax.data.examples import vqa
from mplug_jax.data.images import reader
from mplug_jax.data.sources import vqa as sources
from mplug_jax.data.sources.chunked import Chunked
from mplug_jax.data.text import cleaning

WORDS = [
  "[PAD]",
  "[CLS]",
  "[SEP]",
  "what",
  "color",
  "is",
  "it",
  "red",
  "dark",
  "blue",
  "stop",
  "sign",
  "one",
  "two",
  "three",
]
# Unlike BERT's, to catch numbers written into the code
PAD = 9
BOS = 7
EOS = 8


class WordTokenizer:
  """One token per word; ids from 100, except the special ones."""

  pad_id = PAD
  bos_id = BOS
  eos_id = EOS

  def __init__(self):
    self.calls = collections.Counter()

  def encode(self, text):
    self.calls[text] += 1
    return [BOS, *(ids(word)[0] for word in text.split())]


def ids(*words):
  return [EOS if word == "[SEP]" else 100 + WORDS.index(word) for word in words]


def question(number, text="what color is it", answers=("red",), weights=None, **extra):
  return {
    "question_id": number,
    "question": text,
    "answers": list(answers),
    "weights": weights,
    "ocr": "",
    "objects": "",
    "dataset": "vqa",
    **extra,
  }


def record(*questions, image=None):
  image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3) if image is None else image
  return {"image": image, "image_id": "picture-1", "questions": list(questions)}


def transform(**options):
  strict = options.get("strict", False)
  images = reader.ImageReader(
    options.pop("image_size", 8),
    **{name: options.pop(name) for name in ("augment", "strict", "blank") if name in options},
  )
  return vqa.VqaTransform(
    options.pop("tokenizer", WordTokenizer()),
    images,
    **{
      "questions_per_image": 2,
      "max_question": 6,
      "max_answers": 3,
      "max_answer_tokens": 4,
      "train": True,
      "strict": strict,
      **options,
    },
  )


def rng(seed=0):
  return np.random.default_rng(seed)


def test_example_of_one_record():
  data = record(question(1, answers=["red", "dark blue", "red", "red"]))
  example = transform()(5, data, rng())
  assert {key: (value.shape, value.dtype.name) for key, value in example.items()} == {
    "image": ((8, 8, 3), "uint8"),
    "question": ((2, 6), "int32"),
    "answer": ((2, 3, 4), "int32"),
    "answer_weight": ((2, 3), "float32"),
    "question_valid": ((2,), "bool"),
    "corrupt": ((), "bool"),
    "index": ((), "int32"),
  }
  np.testing.assert_array_equal(example["image"], data["image"])
  np.testing.assert_array_equal(
    example["question"], [[BOS, *ids("what", "color", "is", "it"), PAD], [PAD] * 6]
  )
  np.testing.assert_array_equal(
    example["answer"],
    [[[BOS, *ids("red"), EOS, PAD], [BOS, *ids("dark", "blue"), EOS], [PAD] * 4], [[PAD] * 4] * 3],
  )
  np.testing.assert_array_equal(example["answer_weight"], [[0.75, 0.25, 0], [0, 0, 0]])
  np.testing.assert_array_equal(example["question_valid"], [True, False])
  assert not example["corrupt"]
  assert example["index"] == 5


def test_weights_of_the_source_are_kept():
  example = transform()(
    0, record(question(1, answers=["red", "blue", "red"], weights=[1.0, 0.3])), rng()
  )
  np.testing.assert_array_equal(example["answer_weight"][0], np.float32([1.0, 0.3, 0]))
  with pytest.raises(ValueError, match="Question 1 has 2 unique answers but 3 weights"):
    transform()(0, record(question(1, answers=["red", "blue"], weights=[1, 1, 1])), rng())


def test_words_and_objects_in_the_image():
  asked = question(1, "what is it", ocr="STOP!", objects="sign&&sign")
  for ocr, objects, expected in (
    (False, False, []),
    (True, False, ["[SEP]", "stop"]),
    (False, True, ["[SEP]", "sign", "sign"]),
    (True, True, ["[SEP]", "stop", "[SEP]", "sign", "sign"]),
  ):
    example = transform(add_ocr=ocr, add_objects=objects, max_question=10)(0, record(asked), rng())
    expected = [BOS, *ids("what", "is", "it", *expected)]
    np.testing.assert_array_equal(example["question"][0], expected + [PAD] * (10 - len(expected)))


def test_truncation():
  make = transform(max_question=3, max_answer_tokens=3)
  for _ in range(2):
    example = make(0, record(question(1, answers=["dark blue", "red"])), rng())
    np.testing.assert_array_equal(example["question"][0], [BOS, *ids("what", "color")])
    np.testing.assert_array_equal(
      example["answer"][0, :2], [[BOS, *ids("dark"), EOS], [BOS, *ids("red"), EOS]]
    )
  assert make.truncated_answers == 1


def test_a_tokenizer_that_ends_texts_itself_gives_one_eos():
  class Ending(WordTokenizer):
    def encode(self, text):
      return [*super().encode(text), EOS]

  example = transform(tokenizer=Ending())(0, record(question(1)), rng())
  np.testing.assert_array_equal(example["answer"][0, 0], [BOS, *ids("red"), EOS, PAD])


def test_training_draws_questions_without_replacement():
  data = record(*(question(i, word) for i, word in enumerate(("one", "two", "three"))))
  make = transform()
  drawn = collections.Counter()
  for seed in range(300):
    first, second = (int(row[1]) for row in make(0, data, rng(seed))["question"])
    assert first != second
    drawn.update([first, second])
  assert set(drawn) == set(ids("one", "two", "three"))
  assert max(drawn.values()) < 240  # 200 expected, standard deviation 8.2


def test_evaluation_keeps_all_questions():
  data = record(*(question(i, answers=[]) for i in range(3)))
  with pytest.raises(ValueError, match="3 questions, more than the 2 of a row; wrap"):
    transform(train=False)(0, data, None)
  example = transform(train=False)(0, record(question(1, answers=[])), None)
  assert example["question_valid"][0]
  assert not example["answer_weight"].any()


def test_chunks_have_every_question_once():
  counts = [3, 1, 0, 4, 2]
  numbers = iter(range(100))
  source = sources.VqaRecords(
    [
      {
        "image": f"{i}.png",
        "image_id": str(i),
        "questions": [question(next(numbers)) for _ in range(count)],
      }
      for i, count in enumerate(counts)
    ]
  )
  for size in (1, 2, 3, 5):
    chunked = Chunked(source, size, "questions")
    expected = [
      (str(i), [sum(counts[:i]) + n for n in range(first, min(first + size, count))])
      for i, count in enumerate(counts)
      for first in range(0, count, size)
    ]
    question_ids = [
      (r["image_id"], [q["question_id"] for q in r["questions"]])
      for r in (chunked[i] for i in range(len(chunked)))
    ]
    assert question_ids == expected
    assert [chunked.questions(i) for i in range(len(chunked))] == [
      chunked[i]["questions"] for i in range(len(chunked))
    ]


def test_too_many_answers():
  with pytest.raises(ValueError, match="question 77 has 4 different answers, .*max_answers 3"):
    transform()(0, record(question(77, answers=["one", "two", "three", "red"])), rng())


def test_a_training_question_without_answers_is_counted_named_and_not_valid(caplog):
  bad = record(question(77, answers=[]), question(78))
  example = transform()(0, bad, rng())
  np.testing.assert_array_equal(example["question_valid"], [False, True])
  assert not example["answer_weight"][0].any()
  assert caplog.messages == ["Question 77 has no answer to train on. It has no weight."]
  with pytest.raises(RecordError, match="Question 77 has no answer"):
    transform(strict=True)(0, bad, rng())
  evaluated = transform(train=False)(0, bad, None)
  np.testing.assert_array_equal(evaluated["question_valid"], [True, True])


def test_evaluation_encodes_the_first_answers():
  asked = question(77, answers=["one", "two", "three", "red"])
  example = transform(train=False)(0, record(asked), None)
  fewer = transform(train=False)(0, record(question(77, answers=["one", "two", "three"])), None)
  np.testing.assert_array_equal(example["answer"], fewer["answer"])
  assert example["question_valid"].tolist() == [True, False]


def test_augmentation_only_in_training():
  options = {"scale": (1, 1), "flip": 1.0, "randaugment": None}
  data = record(question(1))
  flipped = transform(augment=options)(0, data, rng())["image"]
  np.testing.assert_array_equal(flipped, data["image"][:, ::-1])
  still = transform(augment=options, train=False)(0, data, None)["image"]
  np.testing.assert_array_equal(still, data["image"])


def test_images_are_resized(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  expected = np.array(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC))
  for image in (str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), pixels):
    example = transform()(0, record(question(1), image=image), rng())
    np.testing.assert_array_equal(example["image"], expected)


def test_corrupt_image_carries_no_weight(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
  (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
  make = transform()
  for name in ("broken.png", "missing.png", "missing.png"):
    example = make(3, {**record(question(1), image=str(tmp_path / name)), "image_id": name}, rng())
    assert example["corrupt"]
    assert example["index"] == 3
    for key in ("image", "answer_weight", "question_valid"):
      assert not example[key].any()
    assert (example["question"] == PAD).all()
    assert (example["answer"] == PAD).all()
    assert name in warnings[-1]
  assert len(warnings) == 2  # once for each image
  for i in range(20):
    make(3, {**record(question(1), image=b"broken"), "image_id": f"picture-{i}"}, rng())
  assert len(warnings) == 10
  assert "picture-7" in warnings[-1]
  with pytest.raises(ImageError, match="missing.png"):
    transform(strict=True)(0, record(question(1), image=str(tmp_path / "missing.png")), rng())


def test_texts_are_encoded_once_and_the_transform_can_be_pickled():
  tokenizer = WordTokenizer()
  make = transform(tokenizer=tokenizer)
  data = record(question(1, answers=["red", "dark blue"]))
  first = make(0, data, rng())
  make(0, data, rng())
  assert tokenizer.calls == {"what color is it": 1, "red": 1, "dark blue": 1}
  copy = pickle.loads(pickle.dumps(make))(0, data, rng())
  for key in first:
    np.testing.assert_array_equal(copy[key], first[key])


class Hashing(WordTokenizer):
  """Any word has an id."""

  def encode(self, text):
    return [BOS, *(100 + sum(map(ord, word)) for word in text.split())]


def test_easy_vqa_through_the_pipeline():
  source = Chunked(sources.get({"name": "easy_vqa"}, "test"), 4, "questions")
  make = transform(
    tokenizer=Hashing(), image_size=64, questions_per_image=4, max_question=16, train=False
  )
  seen = {}
  for batch in pipeline.eval_batches(source, make, batch_size=48):
    for row in np.flatnonzero(batch["mask"]):
      asked = source.questions(int(batch["index"][row]))
      assert batch["question_valid"][row].sum() == len(asked)
      for slot, entry in enumerate(asked):
        text = cleaning.vqa_text(entry["question"])
        tokens = Hashing().encode(text)
        np.testing.assert_array_equal(batch["question"][row, slot, : len(tokens)], tokens)
        seen[entry["question_id"]] = batch["answer"][row, slot, 0, 1]
  assert sorted(seen) == list(range(9673))
  batches = pipeline.train_batches(
    sources.get({"name": "easy_vqa"}, "train"),
    transform(tokenizer=Hashing(), image_size=64, max_question=16),
    batch_size=16,
    seed=0,
  )
  batch = next(batches)
  batches.close()
  assert batch["image"].shape == (16, 64, 64, 3)
  assert not batch["corrupt"].any()
  np.testing.assert_array_equal(batch["answer_weight"].sum(-1), batch["question_valid"])
