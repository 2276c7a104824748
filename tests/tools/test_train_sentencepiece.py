"""The tool that fits a tokenizer to the texts of several configs (tools/train_sentencepiece.py)."""

import json

import pytest

from mplug_jax import config as config_lib
from mplug_jax.data.text import tokenizer as tokenizers
from mplug_jax.training import workdir
from tests.support import tiny_run
from tools import train_sentencepiece


@pytest.fixture
def configs(tmp_path):
  """Arguments --config of questions and of captions about one picture."""
  (tmp_path / "a.png").write_bytes(b"")
  rows = {
    "vqa": {"question": "is there a zebra?", "answer": "yes"},
    "caption": {"caption": "a giraffe in the grass"},
  }
  for name, row in rows.items():
    (tmp_path / name).mkdir()
    for split, extra in (
      ("train", {}),
      ("test", {}),
      ("val", {"question": "what is a quagga?"} if name == "vqa" else {}),
    ):
      (tmp_path / name / f"{split}.jsonl").write_text(
        json.dumps(row | {"image": str(tmp_path / "a.png")} | extra) + "\n"
      )
  return [
    f"--config={tiny_run.ROOT / 'configs' / name}.py:tiny,data=jsonl,root={tmp_path / name}"
    for name in rows
  ]


def test_one_model_for_two_tasks(configs, tmp_path, capsys):
  out = tmp_path / "tokenizer"
  assert (
    train_sentencepiece.main(
      [*configs, f"--out={out}", "--vocab_size=80", "--locations=4", "--held_out"]
    )
    == 0
  )
  answer = capsys.readouterr().out
  tokenizer = tokenizers.load(out)
  text = "is there a giraffe in the grass? zebra"
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.token_id("<bin3>") == 9
  assert f"{tokenizer.vocab_size} tokens, 3 texts" in answer
  assert "vqa.py:tiny" in answer
  assert ", val: 2 of " in answer
  # A run reads it.
  path = answer.rpartition("--config.tokenizer.path=")[2].strip()
  c = config_lib.load(configs[1].removeprefix("--config=")).unlock()
  c.tokenizer.update({"kind": "sentencepiece", "path": path})
  (tmp_path / "run").mkdir()
  assert (
    workdir.prepare_tokenizer(c, str(tmp_path / "run"), None).fingerprint == tokenizer.fingerprint
  )
  with pytest.raises(SystemExit):
    train_sentencepiece.main([*configs, f"--out={out}"])
  assert "already contains a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--config=configs/none.py"], "The config configs/none.py does not exist."),
    (["--vocab_size=6"], "Cannot fit a SentencePiece model of 6 tokens to 3 texts"),
    (
      [f"--config={tiny_run.ROOT}/configs/vqa.py:sizeless"],
      "The config argument 'sizeless' is unknown.",
    ),
  ],
)
def test_what_cannot_be_fitted_is_refused_and_leaves_nothing(
  argv, message, configs, tmp_path, capsys
):
  out = tmp_path / "tokenizer"
  assert train_sentencepiece.main([*configs, f"--out={out}", *argv]) == 1
  assert capsys.readouterr().err.startswith(f"error: {message}")
  assert not out.exists()
