"""An evaluation reads the validation split where there is no test split, and says so."""

import json

import pytest

from mplug_jax.data.text import wordpiece
from mplug_jax.training.evaluate import Evaluation
from tests.support import caption_run, word_list


@pytest.mark.parametrize("task", ["caption", "retrieval", "pretrain"])
def test_val_is_read_and_named(task, tmp_path, caplog):
  tokenizer = wordpiece.WordPieceTokenizer(word_list.text("dog", "cat").encode())
  (tmp_path / "a.png").write_bytes(b"")
  for split, text in (("train", "a dog"), ("val", "a cat")):
    row = {"image": "a.png", "caption": text}
    (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
  c = caption_run.config(f"tiny,data=jsonl,root={tmp_path}", task)
  evaluator = Evaluation(c, tokenizer, str(tmp_path), {}).evaluator
  assert evaluator.source.captions(0) == ["a cat"]
  line = f"{tmp_path}/test.jsonl does not exist: the split val is evaluated."
  assert [record.getMessage() for record in caplog.records].count(line) == 1
  caplog.clear()
  (tmp_path / "test.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a test"}))
  evaluator = Evaluation(c, tokenizer, str(tmp_path), {}).evaluator
  assert evaluator.source.captions(0) == ["a test"]
  assert line not in caplog.text
