"""`tools.prepare_data check` on bad data of every task: warnings and errors."""

import pytest

from configs import caption as caption_config
from mplug_jax.data import check as data_check
from tests.support import check_case
from tests.support.check_case import check, questions, write
from tools import prepare_data


@pytest.fixture
def folder(tmp_path):
  check_case.fill(tmp_path)
  return tmp_path


def test_unreadable_images_are_named(folder, capsys):
  (folder / "4.png").unlink()
  (folder / "5.png").write_bytes(b"no image")
  (folder / "6.png").write_bytes((folder / "6.png").read_bytes()[:-200])
  status, lines, _ = check(capsys, write(folder, questions()), "--task=vqa")
  assert status == 0
  assert "images    12: 9 readable, 1 missing, 2 corrupt" in lines
  assert f"  missing: {folder}/4.png" in lines
  assert f"  corrupt: Image {folder}/5.png cannot be read: not an image of a known format." in lines
  assert any(line.startswith(f"  corrupt: Image {folder}/6.png cannot be read: ") for line in lines)
  assert "warning: 3 of 12 images cannot be read; their texts would not count." in lines
  for i in range(12):
    (folder / f"{i}.png").write_bytes(b"no image")
  status, lines, _ = check(
    capsys, folder / "train.jsonl", "--task=vqa", f"--sheet={folder}/sheet.png"
  )
  assert status == 1
  assert lines[-2:] == [
    "error: None of the 12 images can be read.",
    "sheet     none, because no image can be read",
  ]
  assert sum(line.startswith("  corrupt: ") for line in lines) == 10
  assert not (folder / "sheet.png").exists()


def test_questions_that_cannot_be_scored(folder, capsys):
  rows = questions(4)
  rows[0]["answer"] = ["", " "]
  rows[1]["answer"] = "purple"  # no word of the vocabulary
  rows[2]["answer"] = ["Dog"] * 3
  _, lines, _ = check(
    capsys,
    write(folder, rows),
    "--task=vqa",
    "--split=val",
    f"--tokenizer={folder}/vocab.txt",
  )
  assert (
    "warning: 1 of 4 questions have only blank answers and are not scored: question_id 100."
    in lines
  )
  (sentence,) = [line for line in lines if "never be answered right" in line]
  assert sentence.startswith("warning: 1 of 4 questions")
  assert sentence.endswith("question_id 101 ('purple').")


def test_warnings_about_ids_texts_and_lists(folder, capsys):
  rows = questions(4)
  rows[1]["question_id"] = rows[2]["question_id"] = 7
  rows[2]["question"] = "  "
  rows[3]["answer"] = "['a', 'b']"
  _, lines, _ = check(capsys, write(folder, rows), "--task=vqa")
  assert "ids       3 different, 1 of them more than once: 7" in lines
  assert "question  4, 1 empty" in lines
  assert lines[-3:] == [
    "warning: 1 ids occur more than once.",
    "warning: 1 of 4 questions are empty.",
    "warning: 1 answers look like lists, but are no valid JSON and so are text: \"['a', 'b']\".",
  ]


def test_too_many_answers_are_an_error(folder, capsys):
  status, lines, _ = check(
    capsys, write(folder, questions(3, answer=[str(i) for i in range(11)])), "--task=vqa"
  )
  assert status == 1
  assert (
    lines[-1]
    == "error: 3 questions have more different answers than config.data.max_answers=10; raise it."
  )


def test_boxes_outside_the_image(folder, capsys):
  boxes = [
    [0, 0, 30, 20],
    [-1, 0, 5, 5],
    [20, 10, 40, 15],
    [29, 19, 99, 99],
    [50, 0, 60, 5],
    [0, -9, 5, 0],
  ]
  rows = [
    {"image": "0.png", "text": "A dog", "box": box, "id": i + 5} for i, box in enumerate(boxes)
  ]
  path = write(folder, rows)
  status, lines, _ = check(capsys, path, "--task=grounding", f"--sheet={folder}/sheet.png")
  assert status == 0
  assert "boxes     6: 2 outside their image, 3 reaching beyond it" in lines
  outside = (
    f"2 boxes lie outside their image: {folder}/0.png: (50.0, 0.0, 60.0, 5.0) of 'A dog' "
    f"in 30 x 20 pixels; {folder}/0.png: (0.0, -9.0, 5.0, 0.0) of 'A dog' in 30 x 20 pixels"
  )
  assert f"warning: {outside}; their texts would not count." in lines
  status, lines, _ = check(capsys, write(folder, rows[4:]), "--task=grounding")
  assert status == 1
  assert f"error: All {outside}." in lines
  status, lines, _ = check(capsys, write(folder, rows[:4]), "--task=grounding")
  assert status == 0
  assert lines[-1] == "warning: 3 of 4 boxes reach beyond their image; they would be cut there."


@pytest.mark.parametrize(
  ("task", "row", "options", "message"),
  [
    (
      "vqa",
      {"image": "0.png", "question": "So?"},
      (),
      "line 1: key 'answer' is missing; it has image, question; name it with",
    ),
    (
      "vqa",
      {"image": "none.png", "question": "So?", "answer": "no"},
      (),
      "line 1: image {folder}/none.png does not exist",
    ),
    (
      "caption",
      {"image": "0.png", "caption": 3},
      (),
      "line 1: caption must be a string or a list of strings",
    ),
    (
      "grounding",
      {"image": "0.png", "text": "it", "box": [1, 2]},
      (),
      "line 1: the box must be a list of four numbers",
    ),
    (
      "snli_ve",
      {"image": "0.png", "sentence": "It", "label": "maybe"},
      (),
      "line 1: label 'maybe' is not one of config.data.labels",
    ),
    (
      "vqa",
      {},
      ("--data=coco",),
      "The config argument data='coco' is unknown; there are easy_vqa, scenes, vqa_v2, jsonl",
    ),
    (
      "vqa",
      {"image": "0.png", "question": "So?", "answer": "no"},
      ("--tokenizer={folder}/none.txt",),
      "none.txt does not exist",
    ),
    (
      "vqa",
      {"image": "0.png", "question": "So?", "answer": "no"},
      ("--against", "{folder}/none.csv"),
      "none.csv, which does not exist",
    ),
    (
      "vqa",
      {"image": "0.png", "question": "So?", "answer": "no"},
      ("--fields=image=file,q=x",),
      "'q' is no key of source jsonl",
    ),
  ],
)
def test_unusable_data_gives_one_error_line(folder, capsys, task, row, options, message):
  options = [option.format(folder=folder) for option in options]
  status, lines, err = check(capsys, write(folder, [row]), f"--task={task}", *options)
  assert status == 1
  assert lines == []
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  assert message.format(folder=folder) in err


def test_no_records_is_an_error(folder, capsys):
  status, lines, _ = check(capsys, write(folder, []), "--task=vqa")
  assert status == 1
  assert lines[-1] == "error: There are no records."


def test_wrong_arguments(folder, capsys):
  for arguments in (
    ["check", "x", "--task=vqa", "--labels=a/b"],
    ["check", "x", "--task=vqa", "--limit=-1"],
    ["check", "x"],
    [],
  ):
    with pytest.raises(SystemExit) as error:
      prepare_data.main(arguments)
    assert error.value.code == 2
  assert "--labels applies to nlvr2 and snli_ve, not to vqa." in capsys.readouterr().err
  status, _, err = check(
    capsys, write(folder, questions()), "--task=vqa", f"--sheet={folder}/none/sheet.png"
  )
  assert status == 2
  assert err.startswith("error: the sheet could not be written: ")


def test_check_of_a_config():
  """Checks generated images of two splits, as commands with a config do."""
  config = caption_config.get_config("tiny")
  report = data_check.check(config, "train", against=[("val", config, "val")], limit=3)
  assert (report.records, report.images, report.errors, report.warnings) == (
    3,
    3,
    [],
    [],
  )
  assert report.overlaps == {"val": ([], [])}
  assert report.texts["caption"].count == 15
  assert len(report.samples) == 3


def test_strict_reading_makes_a_corrupt_image_an_error(folder):
  (folder / "7.png").write_bytes(b"no image")
  path = write(folder, [{"image": f"{i}.png", "caption": "a dog"} for i in range(12)])
  config = caption_config.get_config(f"tiny,data=jsonl:{path}")
  assert data_check.check(config).errors == []
  config.data.strict = True
  assert data_check.check(config).errors == [
    "config.data.strict=True, and 1 of 12 images cannot be read."
  ]
