"""The predict command: rows in, lines out, continued outputs, and rows without a result."""

import json
import os
import tempfile
import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from mplug_jax import predict
from mplug_jax.inference import predictor as predictor_lib
from mplug_jax.inference import result_file
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


def test_a_folder_and_one_question(folder, fake, capsys, caplog):
  (folder / "photos" / "._a.png").write_bytes(b"of macOS")
  (folder / "photos" / "notes.txt").write_text("mine")
  assert run(f"--images={folder}/photos", "--question=what?") == 0
  result = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [row["image"].rpartition("photos/")[2] for row in result] == [
    "a.png",
    "b.png",
    "bad.png",
    "c.png",
    "more/d.png",
  ]
  assert "1 without the suffix of an image" in caplog.text
  assert "1 hidden" in caplog.text
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
    ((rows, f"--output={folder}/other.jsonl"), "line 1 is not the result of row 1"),
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


def refused(capsys, *args):
  """Runs a command that exits with status 1 and one line; returns the line."""
  capsys.readouterr()
  assert run(*args) == 1
  err = capsys.readouterr().err
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  return err


@pytest.mark.parametrize(
  "content",
  [
    b'[{"image": "a.png", "question": "q", "answer": "cat"}]',  # JSON of one line without an end
    b"line one\nsecond line without an end",
    b'{"id": 0}',
    b'{"id": 0}\n',
    b'{"id": 0, "image": "photos/a.png", "question": "q0"}\n',  # a row, not its result
    b'{"id": 0, "image": "photos/a.png", "question": "q0", "answer": "x"}\n',  # without its score
    b"\x89PNG\r\n",
    b"\n",
  ],
)
def test_files_that_are_no_results_of_the_job_are_not_touched(folder, fake, capsys, content):
  path = folder / "mine.json"
  path.write_bytes(content)
  assert "mine.json exists and" in refused(
    capsys, f"--input={folder}/rows.jsonl", f"--output={path}"
  )
  assert path.read_bytes() == content
  assert sorted(p.name for p in folder.iterdir()) == ["mine.json", "photos", "rows.jsonl"]
  assert not fake.calls


def test_the_input_is_no_output(folder, fake, capsys):
  (folder / "link.jsonl").symlink_to(folder / "rows.jsonl")
  before = (folder / "rows.jsonl").read_bytes()
  for name in ("rows.jsonl", "link.jsonl"):
    message = refused(capsys, f"--input={folder}/rows.jsonl", f"--output={folder / name}")
    assert "is the file of --input" in message
  assert (folder / "rows.jsonl").read_bytes() == before


def test_only_the_same_job_is_continued(folder, fake, capsys, monkeypatch):
  output = folder / "out.jsonl"
  checkpoint = folder / "run"
  (checkpoint / "tokenizer").mkdir(parents=True)
  (checkpoint / "checkpoints" / "3").mkdir(parents=True)
  (checkpoint / "checkpoints" / "3" / "arrays").write_bytes(bytes(10))
  (checkpoint / "config.json").write_text("{}")
  (folder / "more.jsonl").write_text((folder / "rows.jsonl").read_text().replace("q4", "q5"))
  same = (f"--checkpoint={checkpoint}", f"--input={folder}/rows.jsonl", f"--output={output}")
  assert run(*same) == 0
  whole = output.read_bytes()
  output.write_bytes(whole[: whole.index(b"\n") + 9])  # interrupted in the second line
  part = output.read_bytes()
  for change, named in (
    (["--truncate"], "truncate is false instead of true"),
    (["--n=2"], "n is 1 instead of 2"),
    (["--text=x"], 'text is null instead of "x"'),
    ([f"--explain={folder}/maps"], "explain is null"),
    ([f"--checkpoint={folder}/other"], "checkpoint is"),
    ([f"--input={folder}/more.jsonl"], "rows is"),
  ):
    assert named in refused(capsys, *same, *change)
    assert output.read_bytes() == part
  with monkeypatch.context() as patch:
    patch.chdir(checkpoint)
    assert run("--checkpoint=.", "--batch_size=1", *same[1:]) == 0
  assert output.read_bytes() == whole
  (checkpoint / "checkpoints" / "4").mkdir()  # trained on
  (checkpoint / "checkpoints" / "4" / "arrays").write_bytes(bytes(10))
  assert "weights is" in refused(capsys, *same)
  assert output.read_bytes() == whole


def test_failed_rows_of_the_first_part_count_for_strict(folder, fake, capsys):
  command = (f"--input={folder}/rows.jsonl", f"--output={folder}/out.jsonl", "--strict")
  assert run(*command) == 1
  fake.calls = []
  assert run(*command) == 1
  assert "has all 6 rows of this job" in capsys.readouterr().err
  assert not fake.calls


def test_keys_of_rows_are_kept(folder, fake, capsys):
  rows = [
    {"image": "photos/a.png", "question": "q", "answer": "TRUTH"},
    {"image": "photos/bad.png", "question": "q", "error": "of the annotator"},
    {"image": "photos/b.png", "question": "q", "score": [float("nan"), 1]},
  ]
  (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert run(f"--input={folder}/rows.jsonl", f"--output={folder}/out.jsonl") == 0
  first, second, third = lines(folder / "out.jsonl")
  assert first == rows[0] | {"predicted_answer": "q 0", "predicted_score": -0.5}
  assert second["error"] == "of the annotator"
  assert "cannot be read" in second["predicted_error"]
  assert third["score"] == [None, 1]  # NaN is no JSON
  assert "NaN" not in (folder / "out.jsonl").read_text()
  # The output as an input: its predictions are kept too, or the command says why not.
  message = refused(capsys, f"--input={folder}/out.jsonl", f"--output={folder}/again.jsonl")
  assert "answer and predicted_answer" in message


def test_a_score_that_is_not_finite_is_the_error_of_its_row(folder, fake, monkeypatch):
  def answer(images, questions, truncate):
    return [Answer("", float("nan") if q == "q1" else -1.0) for q in questions]

  monkeypatch.setattr(fake, "answer", answer, raising=False)
  assert run(f"--input={folder}/rows.jsonl", f"--output={folder}/out.jsonl", "--strict") == 1
  result = lines(folder / "out.jsonl")
  assert ["error" in row for row in result] == [False, True, True, False, False, True]
  assert "not finite" in result[1]["error"]
  assert "answer" not in result[1]


def test_texts_and_names_that_are_no_unicode_are_errors_of_their_rows(folder, fake):
  rows = [
    {"image": "photos/a.png", "question": "cut emoji \ud83d"},
    {"image": "photos/a.png", "question": "whole emoji \U0001f600"},
    {"image": "photos/\ud83d.png", "question": "q"},
    {"image": "photos/\0.png", "question": "q"},
    {"image": "photos/b.png", "question": "q"},
  ]
  (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert run(f"--input={folder}/rows.jsonl", f"--output={folder}/out.jsonl") == 0
  result = lines(folder / "out.jsonl")
  assert [row["question"] for row in result] == [row["question"] for row in rows]
  assert ["error" in row for row in result] == [True, False, True, True, False]
  assert "no valid Unicode (the lone surrogate" in result[0]["error"]
  assert "cannot be a file name" in result[2]["error"]


def test_a_second_process_does_not_write_the_same_file(folder, fake, capsys):
  first = result_file.ResultFile(str(folder / "out.jsonl"), {})
  second = result_file.ResultFile(str(folder / "out.jsonl"), {})
  first.write([{"a": 1}])
  with pytest.raises(ValueError, match="Another process"):
    second.write([{"a": 2}])
  first.close()
  with pytest.raises(ValueError, match="Another process has written"):
    second.write([{"a": 2}])
  assert lines(folder / "out.jsonl") == [{"a": 1}]


def test_outputs_that_cannot_be_written_are_refused_at_once(folder, fake, capsys):
  rows = f"--input={folder}/rows.jsonl"
  assert "does not exist" in refused(capsys, rows, f"--output={folder}/none/out.jsonl")
  assert "is a folder" in refused(capsys, rows, f"--output={folder}/photos")
  (folder / "out.jsonl.job.json").write_text('{"mine": 1}')
  assert "no file of this command" in refused(capsys, rows, f"--output={folder}/out.jsonl")
  assert (folder / "out.jsonl.job.json").read_text() == '{"mine": 1}'
  (folder / "maps").mkdir()
  (folder / "maps" / "000000.png").write_bytes(b"mine")
  assert "has attention maps of another job" in refused(capsys, rows, f"--explain={folder}/maps")
  assert not fake.calls


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_file_is_continued_exactly_or_left_as_it_is(data):
  """Cut, changed and foreign files: afterwards they are complete, or have the same bytes."""
  rows = [{"id": i, "image": str(i)} for i in range(4)]
  results = [
    row | ({"answer": "a", "score": 0.5} if i != 2 else {"error": "e"})
    for i, row in enumerate(rows)
  ]
  whole = "".join(map(result_file.to_line, results)).encode()
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "out.jsonl")
    if data.draw(st.booleans(), "recorded"):
      first = result_file.ResultFile(path, {"n": 1})
      first.write(results[:1])
      first.close()
    content = whole[: data.draw(st.integers(0, len(whole)), "cut")]
    if change := data.draw(st.binary(max_size=2), "change"):
      at = data.draw(st.integers(0, len(content)), "at")
      content = content[:at] + change + content[at + data.draw(st.integers(0, 2)) :]
    with open(path, "wb") as file:
      file.write(content)
    try:
      output = result_file.ResultFile(path, {"n": 1})
      output.check(iter(rows), 4, {"answer", "score"}, "error", {"explained"})
    except ValueError:
      with open(path, "rb") as file:
        assert file.read() == content
      return
    if output.done < 4:
      output.write(results[output.done :])
      output.close()
    with open(path, "rb") as file:
      written = [json.loads(line) for line in file]
    assert [row["id"] for row in written] == [0, 1, 2, 3]
    if not change:
      assert written == results


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
