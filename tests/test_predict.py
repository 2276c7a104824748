"""The predict command: rows in, lines out, continued outputs, and rows without a result."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from mplug_jax import predict
from mplug_jax.inference import jsonl
from mplug_jax.inference import predictor as predictor_lib
from mplug_jax.inference.results import Answer
from tests.support import predictor_run


class Fake:
  """A Predictor that answers with the image's brightness; `calls` has the size of every call."""

  batch_size = 2
  config = types.SimpleNamespace(model=types.SimpleNamespace(image_size=8))

  def __init__(self):
    self.calls = []

  def task(self, method):
    assert method == "answer"

  def text_rows(self, method):
    def rows(texts, truncate):
      if texts == [""]:
        raise ValueError("The question '' is empty.")

    return rows

  def answer(self, images, questions, truncate):
    self.calls.append(len(images))
    return [
      Answer(f"{question} {int(image.mean())}", -0.5)
      for image, question in zip(images, questions, strict=True)
    ]


@pytest.fixture
def folder(tmp_path):
  """Five images, one of which cannot be read, and a file of questions about them."""
  (tmp_path / "photos" / "more").mkdir(parents=True)
  names = ["photos/a.png", "photos/b.png", "photos/bad.png", "photos/c.png", "photos/more/d.png"]
  for i, name in enumerate(names):
    Image.fromarray(np.full((9, 9, 3), 10 * i, np.uint8)).save(tmp_path / name)
  (tmp_path / "photos/bad.png").write_bytes(b"no")
  rows = [{"id": i, "image": name, "question": f"q{i}"} for i, name in enumerate(names)] + [
    {"id": 5, "image": names[0], "question": ""}
  ]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return tmp_path


@pytest.fixture
def fake(monkeypatch):
  made = Fake()
  monkeypatch.setattr(predictor_lib.Predictor, "load", lambda *args, **options: made)
  return made


def run(*args):
  return predict.main(["--checkpoint=run", "--task=vqa", *map(str, args)])


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_a_file(folder, fake, capsys):
  assert run(f"--input={folder}/rows.jsonl", f"--output={folder}/out.jsonl") == 0
  result = lines(folder / "out.jsonl")
  assert [row["id"] for row in result] == list(range(6))
  assert fake.calls == [2, 1, 1]
  assert result[1] == {
    "id": 1,
    "image": "photos/b.png",
    "question": "q1",
    "answer": "q1 10",
    "score": -0.5,
  }
  assert "cannot be read" in result[2]["error"]
  assert "is empty" in result[5]["error"]
  assert "answer" not in result[2]
  err = capsys.readouterr().err
  assert "2 of 6 rows have no result" in err
  assert "bad.png" in err
  assert run(f"--input={folder}/rows.jsonl", f"--output={folder}/again.jsonl", "--strict") == 1


def test_it_goes_on_behind_a_torn_line(folder, fake):
  assert run(f"--input={folder}/rows.jsonl", f"--output={folder}/whole.jsonl") == 0
  complete = (folder / "whole.jsonl").read_bytes()
  part, fake.calls = folder / "part.jsonl", []
  part.write_bytes(complete[: len(complete) // 2])
  left = 6 - complete[: len(complete) // 2].count(b"\n")
  assert run(f"--input={folder}/rows.jsonl", f"--output={part}") == 0
  assert part.read_bytes() == complete
  assert sum(fake.calls) < left
  fake.calls = []
  assert run(f"--input={folder}/rows.jsonl", f"--output={part}") == 0
  assert not fake.calls
  assert part.read_bytes() == complete


def test_a_folder_and_one_question(folder, fake, capsys):
  assert run(f"--images={folder}/photos", "--question=what?") == 0
  result = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [row["image"].rpartition("photos/")[2] for row in result] == [
    "a.png",
    "b.png",
    "bad.png",
    "c.png",
    "more/d.png",
  ]
  assert result[4]["answer"] == "what? 40"
  assert result[4]["question"] == "what?"


def test_commands_that_make_no_sense_are_refused(folder, fake, capsys):
  (folder / "other.jsonl").write_text('{"id": 9, "image": "x"}\n')
  (folder / "broken.jsonl").write_text('{"id": 9}\n')
  rows = f"--input={folder}/rows.jsonl"
  for args, message in (
    ((), "Give one of"),
    ((rows, f"--images={folder}"), "Give one of"),
    ((f"--images={folder}/photos",), "needs a text"),
    ((f"--images={folder}/none", "--text=a"), "has no images"),
    ((f"--input={folder}/broken.jsonl",), "line 1 has no image and no"),
    ((rows, f"--output={folder}/other.jsonl"), "has results of other rows"),
    (("--task=caption", rows, "--text=a"), "--prompt"),
    (("--task=nlvr2", f"--images={folder}", "--text=a"), "pairs of images"),
    ((f"--input={folder}/no.jsonl",), "no.jsonl"),
  ):
    assert run(*args) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: "), err
    assert message in err
    assert err.count("\n") == 1, err
  assert lines(folder / "other.jsonl") == [{"id": 9, "image": "x"}]
  assert not fake.calls


def test_a_file_of_results_loses_its_torn_line_alone(tmp_path):
  path = tmp_path / "out.jsonl"
  path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
  results = jsonl.Results(path)
  assert results.done == 2
  results.check({"a": 2})
  with pytest.raises(ValueError, match="other rows"):
    results.check({"a": 3})
  results.write([{"a": 3}])
  results.close()
  assert lines(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.slow
def test_the_real_thing(folder, tmp_path, capsys):
  run_folder = predictor_run.save(tmp_path / "run", predictor_run.config("pretrain"))
  for task, options, key in (
    ("vqa", ["--question=what?"], "answer"),
    ("caption", ["--n=2"], "captions"),
    ("retrieval", ["--text=a red square"], "probability"),
    ("embed", [], "embedding"),
  ):
    assert (
      predict.main(
        [f"--checkpoint={run_folder}", f"--task={task}", f"--images={folder}/photos", *options]
      )
      == 0
    )
    result = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [key in row for row in result] == [True, True, False, True, True]
  assert (
    predict.main(
      [f"--checkpoint={run_folder}", "--task=grounding", f"--images={folder}/photos", "--text=a"]
    )
    == 1
  )
  assert "configs/grounding.py" in capsys.readouterr().err
