"""`tools.prepare_data check` on good data of every task: counts, lengths and the sheet."""

import pathlib
import zipfile

import pytest
from PIL import Image

from tests.support import check_case
from tests.support.check_case import check, questions, write


@pytest.fixture
def folder(tmp_path):
  check_case.fill(tmp_path)
  return tmp_path


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
