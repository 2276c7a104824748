"""The fingerprint of the training data: same data resume, other data are refused."""

import json
import os
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import caption as caption_config
from configs import grounding as grounding_config
from configs import vqa as vqa_config
from mplug_jax import data
from mplug_jax.runtime import files
from mplug_jax.training import data_fingerprint, loop
from tests.support.grounding_files import legacy, painted, png


def questions(folder, rows, name="train.jsonl"):
  (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "a.png").write_bytes(png(painted(40, 60)))


def row(question="what?", answer="a dog"):
  return {"image": "a.png", "question": question, "answer": answer}


def config(folder, module=vqa_config, source="jsonl"):
  return module.get_config(f"tiny,data={source},root={folder}").unlock()


def check(folder, c, resuming):
  data_fingerprint.check(c, str(folder), data.get_source(c, "train"), resuming)


def test_a_run_resumes_with_the_same_data_wherever_the_files_are_written_anew(tmp_path):
  questions(tmp_path, [row(), row("who?")])
  c = config(tmp_path)
  check(tmp_path, c, resuming=False)
  written = json.loads((tmp_path / "data.json").read_text())
  assert written["records"] == 2
  assert [file["bytes"] for file in written["files"]] == [(tmp_path / "train.jsonl").stat().st_size]
  questions(tmp_path, [row(), row("who?")])
  os.utime(tmp_path / "train.jsonl", (0, 0))
  check(tmp_path, c, resuming=True)
  assert json.loads((tmp_path / "data.json").read_text()) == written


@pytest.mark.parametrize(
  ("rows", "said"),
  [
    ([row(), row("who?"), row()], "bytes instead of"),
    ([row("who?"), row()], "other content in"),
    ([row(), row("why?")], "other content in"),
  ],
  ids=["one more", "another order", "another text"],
)
def test_other_rows_are_refused(tmp_path, rows, said):
  questions(tmp_path, [row(), row("who?")])
  c = config(tmp_path)
  check(tmp_path, c, resuming=False)
  before = (tmp_path / "data.json").read_bytes()
  questions(tmp_path, rows)
  with pytest.raises(ValueError, match="holds a run on other training data") as error:
    check(tmp_path, c, resuming=True)
  message = str(error.value)
  assert message.startswith(f"{tmp_path} holds a run")
  assert f"{tmp_path}/train.jsonl: " in message
  assert said in message
  assert ("3 records instead of 2" in message) == (len(rows) == 3)
  assert (tmp_path / "data.json").read_bytes() == before
  (tmp_path / "data.json").unlink()  # as the message says
  check(tmp_path, c, resuming=True)
  check(tmp_path, c, resuming=True)


def test_a_new_start_in_a_used_folder_takes_the_present_data(tmp_path):
  questions(tmp_path, [row()])
  c = config(tmp_path)
  check(tmp_path, c, resuming=False)
  questions(tmp_path, [row(), row()])
  check(tmp_path, c, resuming=False)
  check(tmp_path, c, resuming=True)


def test_a_run_of_an_earlier_version_resumes_and_gets_a_fingerprint(tmp_path):
  questions(tmp_path, [row()])
  check(tmp_path, config(tmp_path), resuming=True)
  assert (tmp_path / "data.json").exists()


def test_a_change_anywhere_in_a_large_file_of_other_size_is_seen(tmp_path, monkeypatch):
  monkeypatch.setattr(data_fingerprint, "_WHOLE", 1000)
  monkeypatch.setattr(files, "_BLOCK", 100)
  path = tmp_path / "large.jsonl"
  content = np.random.default_rng(0).integers(0, 256, 10_000).astype(np.uint8)
  path.write_bytes(content.tobytes())
  first = data_fingerprint._file(str(path))
  for position in (0, 50, 9_999):
    changed = content.copy()
    changed[position] ^= 1
    path.write_bytes(changed.tobytes())
    assert data_fingerprint._file(str(path))["hash"] != first["hash"]
  path.write_bytes(content.tobytes())
  assert data_fingerprint._file(str(path)) == first


def test_shards_are_known_by_names_and_sizes(tmp_path):
  for number, size in enumerate((512, 1024)):
    (tmp_path / f"train-{number}.tar").write_bytes(b"\0" * size)
  pattern = f"{tmp_path}/train-*.tar"
  first = data_fingerprint._file(pattern)
  assert first["bytes"] == 1536
  (tmp_path / "train-2.tar").write_bytes(b"\0" * 512)
  more = data_fingerprint._file(pattern)
  assert more["hash"] != first["hash"]
  os.remove(tmp_path / "train-2.tar")
  assert data_fingerprint._file(pattern) == first


def test_a_folder_of_captions_is_known_by_its_texts(tmp_path):
  for split in ("train", "val"):
    (tmp_path / split).mkdir()
    (tmp_path / split / "a.png").write_bytes(png(painted(40, 60)))
    (tmp_path / split / "a.txt").write_text("a dog\n")
  c = config(tmp_path, caption_config, "folder")
  check(tmp_path, c, resuming=False)
  check(tmp_path, c, resuming=True)
  (tmp_path / "train" / "a.txt").write_text("a cat\n")
  with pytest.raises(ValueError, match="other texts"):
    check(tmp_path, c, resuming=True)


def test_official_lists_of_phrases_are_known(tmp_path):
  folder = tmp_path / "ln_data" / "other/images/mscoco/images/train2014"
  folder.mkdir(parents=True)
  (folder / "0.jpg").write_bytes(png(painted(40, 60)))
  lists = tmp_path / "data" / "unc"
  c = grounding_config.get_config(f"tiny,data=transvg,dataset=unc,root={tmp_path}").unlock()
  lists = pathlib.Path(c.data.split_root) / "unc"
  lists.mkdir(parents=True, exist_ok=True)
  (lists / "unc_train.pth").write_bytes(legacy([("0.jpg", "", [1, 2, 13, 14], "a dog", [])]))
  check(tmp_path, c, resuming=False)
  (lists / "unc_train.pth").write_bytes(legacy([("0.jpg", "", [1, 2, 13, 15], "a dog", [])]))
  with pytest.raises(ValueError, match="unc_train.pth: other content"):
    check(tmp_path, c, resuming=True)


def test_generated_data_have_none(tmp_path):
  check(tmp_path, vqa_config.get_config("tiny,data=scenes"), resuming=False)
  assert not (tmp_path / "data.json").exists()


def test_a_training_checks_its_data(tmp_path, monkeypatch):
  class Reached(Exception):
    pass

  def stop(*args):
    raise Reached

  questions(tmp_path, [row()])
  shutil.copy(tmp_path / "train.jsonl", tmp_path / "val.jsonl")
  monkeypatch.setattr(loop, "prepare_tokenizer", stop)
  monkeypatch.setattr(loop.Manager, "latest_step", lambda self: 1)  # as if there were a checkpoint
  c = config(tmp_path)
  c.compilation_cache = ""
  with pytest.raises(Reached):
    loop.train(c, str(tmp_path / "run"))
  questions(tmp_path, [row("who?")])
  with pytest.raises(ValueError, match="run holds a run on other training data"):
    loop.train(c, str(tmp_path / "run"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
  first=st.lists(st.sampled_from(["what?", "who?", "why?"]), min_size=1, max_size=5),
  second=st.lists(st.sampled_from(["what?", "who?", "why?"]), min_size=1, max_size=5),
)
def test_fingerprints_are_equal_exactly_for_equal_rows(first, second):
  hashes = []
  for texts in (first, second):
    with tempfile.TemporaryDirectory() as folder:
      questions(pathlib.Path(folder), [row(text) for text in texts])
      hashes.append(data_fingerprint._file(f"{folder}/train.jsonl")["hash"])
  assert (hashes[0] == hashes[1]) == (first == second)
