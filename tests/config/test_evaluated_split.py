"""The split that is evaluated on the user's own data: test if it exists, else val."""

import copy
import importlib

import pytest

from mplug_jax import config as config_lib

# Config -> the split that it evaluates if both exist.
OWN_FILES = {
  "caption": "test",
  "caption_scst": "test",
  "retrieval": "test",
  "pretrain": "test",
  "vqa": "val",
  "grounding": "val",
  "nlvr2": "val",
  "snli_ve": "val",
}
FOLDERS = ("caption", "retrieval", "pretrain")


def config(name, arg):
  return importlib.import_module(f"configs.{name}").get_config(f"tiny,{arg}")


def write(folder, *names):
  for name in names:
    (folder / name).write_text("")


@pytest.mark.parametrize("name", OWN_FILES)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".json.gz"])
def test_val_is_evaluated_where_there_is_no_test_file(name, suffix, tmp_path):
  write(tmp_path, f"train{suffix}", f"val{suffix}")
  for arg in (f"data=jsonl,root={tmp_path}", f"data=jsonl:{tmp_path}/train{suffix}"):
    c = config(name, arg)
    assert c.eval.split == "val"
    note = f"{c.data.test_file} does not exist: the split val is evaluated."
    assert config_lib.split_note(c) == (note if OWN_FILES[name] == "test" else "")
  write(tmp_path, f"test{suffix}")
  c = config(name, f"data=jsonl,root={tmp_path}")
  assert c.eval.split == OWN_FILES[name]
  assert config_lib.split_note(c) == ""


@pytest.mark.parametrize("name", FOLDERS)
def test_val_is_evaluated_where_there_is_no_test_folder(name, tmp_path):
  (tmp_path / "val").mkdir()
  c = config(name, f"data=folder,root={tmp_path}")
  assert c.eval.split == "val"
  assert config_lib.split_note(c) == f"{tmp_path}/test does not exist: the split val is evaluated."
  (tmp_path / "test").mkdir()
  assert c.eval.split == "test"
  assert config_lib.split_note(c) == ""


def test_the_split_follows_the_files_until_it_is_set(tmp_path):
  write(tmp_path, "train.jsonl", "val.jsonl", "mine.jsonl")
  c = config("retrieval", f"data=jsonl,root={tmp_path}")
  c.update_from_flattened_dict({"data.test_file": f"{tmp_path}/mine.jsonl"})
  assert c.eval.split == "test"
  restored = config_lib.from_json(config_lib.to_json(c))
  assert restored.eval.split == copy.deepcopy(c).eval.split == "test"
  c.update_from_flattened_dict({"data.test_file": f"{tmp_path}/none.jsonl"})
  assert c.eval.split == "val"
  assert config_lib.from_json(config_lib.to_json(c)).eval.split == "val"
  c.update_from_flattened_dict({"eval.split": "test"})
  assert c.eval.split == "test"


def test_without_val_too_the_error_names_the_test_file(tmp_path):
  c = config("caption", f"data=jsonl,root={tmp_path}")
  assert c.eval.split == "test"
  assert config_lib.split_note(c) == ""
  assert config("caption", "data=scenes").eval.split == "test"


@pytest.mark.parametrize(
  ("name", "arg"),
  [
    ("pretrain", "data=files"),
    ("video_caption", "data=vatex"),
    ("video_retrieval", "data=msrvtt"),
    ("video_qa", "data=video_qa"),
  ],
)
def test_recipes_of_the_paper_evaluate_the_test_split(name, arg, tmp_path):
  write(tmp_path, "val.jsonl", "coco_val.json")
  assert config(name, f"{arg},root={tmp_path}").eval.split == "test"
