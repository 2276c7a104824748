"""`tools.prepare_data check` on good and bad data of every task: counts, warnings and errors."""

import json
import pathlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from configs import caption as caption_config
from mplug_jax.data import check as data_check
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


@pytest.fixture
def folder(tmp_path):
  """Twelve images, 20 pixels high and from 30 to 41 wide, and a vocabulary."""
  rng = np.random.default_rng(0)
  for i in range(12):
    Image.fromarray(rng.integers(0, 256, (20, 30 + i, 3), np.uint8)).save(tmp_path / f"{i}.png")
  (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
  return tmp_path


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


# ---- good data


def test_questions(folder, capsys):
  status, lines, err = check(
    capsys,
    write(folder, questions()),
    "--task=vqa",
    f"--tokenizer={folder}/vocab.txt",
    f"--sheet={folder}/sheet.png",
  )
  assert (status, err) == (0, "")
  assert lines == [
    f"{folder}/train.jsonl, read as jsonl for vqa",
    "records   12",
    "images    12: 12 readable, 0 missing, 0 corrupt",
    "ids       12 different, 0 of them more than once",
    "question  12, 0 empty",
    "  words   50% have at most 3, 90% have at most 3, 99% have at most 3, the longest has 3",
    "  tokens  50% have at most 5, 90% have at most 5, 99% have at most 5, the longest has 5; "
    "0 exceed config.data.max_question=32 and are cut",
    "answer    24, 0 empty",
    "  words   50% have at most 2, 90% have at most 2, 99% have at most 2, the longest has 2",
    "  tokens  50% have at most 4, 90% have at most 4, 99% have at most 4, the longest has 4; "
    "0 exceed config.data.max_answer_tokens=12 and are cut",
    "answers   13 different; of all given, the most frequent 10 make up 91.7%, 100 make up "
    "100.0%, 1,000 make up 100.0%",
    "  a dog 24 (66.7%), " + ", ".join(f"cat {i} 1 (2.8%)" for i in range(9)) + ", ...",
    f"sheet     {folder}/sheet.png",
  ]
  assert Image.open(folder / "sheet.png").size > (1000, 1000)


def test_a_sheet_replaces_a_sheet_and_nothing_else(folder, capsys):
  rows = write(folder, questions())
  photo = next(folder.rglob("*.png"))
  for path in map(pathlib.Path, (photo, folder / "vocab.txt", rows)):
    before = path.read_bytes()
    status, lines, err = check(capsys, rows, "--task=vqa", f"--sheet={path}")
    assert (status, lines) == (1, [])
    assert "exists and is no sheet of this command" in err
    assert path.read_bytes() == before
  for _ in range(2):
    assert check(capsys, rows, "--task=vqa", f"--sheet={folder}/sheet.png")[0] == 0


def test_captions_in_an_archive_with_other_keys(folder, capsys):
  with zipfile.ZipFile(folder / "photos.zip", "w") as file:
    for i in range(4):
      file.write(folder / f"{i}.png", f"{i}.png")
  rows = [{"file": f"{i}.png", "text": ["A red dog", "two dogs " * (10 * i)]} for i in range(4)]
  status, lines, _ = check(
    capsys,
    write(folder, rows),
    "--task=retrieval",
    f"--image_root={folder}/photos.zip",
    "--fields=image=file,caption=text",
    f"--tokenizer={folder}/vocab.txt",
  )
  assert status == 0
  assert "images    4: 4 readable, 0 missing, 0 corrupt" in lines
  assert "caption   8, 1 empty" in lines
  assert (
    "  words   50% have at most 3, 90% have at most 60, 99% have at most 60, the longest has 60; "
    "2 exceed config.data.max_words=30 and are cut" in lines
  )
  # Thirty words and [CLS].
  assert any(
    line.startswith("  tokens  ")
    and "the longest has 31; 2 exceed config.data.max_caption=30" in line
    for line in lines
  )
  assert "warning: 1 of 8 captions are empty." in lines


def test_a_folder_of_images_with_captions(folder, capsys):
  for split in ("train", "val"):
    (folder / split).mkdir()
  for i in range(2):
    (folder / f"{i}.png").rename(folder / "train" / f"{i}.png")
    (folder / "train" / f"{i}.txt").write_text("A dog\n\n  a red dog \n")
  for task in ("caption", "pretrain"):
    status, lines, _ = check(capsys, folder, f"--task={task}", f"--sheet={folder}/sheet.png")
    assert status == 0
    assert lines[0] == f"{folder}, read as folder for {task}"
    assert "caption   4, 0 empty" in lines
  status, _, err = check(capsys, folder, "--task=caption", "--split=val")
  assert status == 1
  assert err.startswith(f"error: {folder}/val holds no image whose name ends with .jpg, ")


def test_statements_about_two_images(folder, capsys):
  rows = [
    {"images": [f"{i}.png", f"{i + 1}.png"], "sentence": "Two dogs.", "label": i % 3 == 0}
    for i in range(6)
  ]
  status, lines, _ = check(
    capsys, write(folder, rows), "--task=nlvr2", f"--sheet={folder}/sheet.png"
  )
  assert status == 0
  assert "labels    False 4 (66.7%), True 2 (33.3%)" in lines
  assert "images    7: 7 readable, 0 missing, 0 corrupt" in lines
  assert "ids       none are given" in lines
  status, lines, _ = check(
    capsys, write(folder, [row | {"label": "x"} for row in rows]), "--task=nlvr2", "--labels=x/y"
  )
  assert status == 0
  assert "warning: No record has the label y." in lines


def test_limit_reads_some_records(folder, capsys):
  status, lines, _ = check(capsys, write(folder, questions()), "--task=vqa", "--limit=5")
  assert status == 0
  assert lines[1] == "records   4"
  assert "images    4: 4 readable, 0 missing, 0 corrupt" in lines


def test_overlap_of_splits(folder, capsys):
  rows = questions()
  val = write(
    folder,
    [rows[3] | {"question_id": 900}, rows[11], {"image": "0.png", "question": "So?"}],
    "val.jsonl",
  )
  none = write(folder, [{"image": "5.png", "question": "So?"}], "test.jsonl")
  status, lines, _ = check(
    capsys, write(folder, rows[:4] + rows[11:]), "--task=vqa", "--against", val, none
  )
  assert status == 0
  start = lines.index(f"shared with {val}: 3 images, 1 ids")
  assert lines[start + 1 : start + 4] == [
    f"  images: {folder}/0.png, {folder}/11.png, {folder}/3.png",
    "  ids: 111",
    f"shared with {none}: 0 images, 0 ids",
  ]
  assert f"warning: 3 images and 1 ids are in {val} too." in lines


# ---- bad data


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
  _, lines, _ = check(capsys, write(folder, rows), "--task=vqa", f"--tokenizer={folder}/vocab.txt")
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
