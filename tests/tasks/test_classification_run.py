"""Classification runs: resumed bit for bit, on official files, with custom classes."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from mplug_jax.checkpoints import manager
from mplug_jax.data.examples import classification
from mplug_jax.data.text import tokenizer as tokenizers
from mplug_jax.evaluators import classification as evaluator
from mplug_jax.training import evaluate, loop
from tests.support import classification_run, tiny_run

pytestmark = pytest.mark.usefixtures("drawn_start")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  return classification_run.write_nlvr2(tmp_path_factory.mktemp("nlvr2"))


@pytest.fixture(scope="module")
def settings(files):
  """Function (changes) -> six updates of the tiny preset on NLVR2's files, with a teacher."""

  def make(**changes):
    return classification_run.config(
      "nlvr2",
      f"tiny,data=nlvr2,root={files}",
      **{
        "tokenizer__kind": "wordpiece",
        "tokenizer__path": str(files / "vocab.txt"),
        "compilation_cache": "",
        "data__max_text": 12,
        "data__augment__randaugment": (2, 7),
        "data__augment__scale": (0.5, 1.0),
        "total_steps": 6,
        # Whatever the length: the build of a run is also that of evaluation.
        "optim__schedule__name": "constant",
        "log_every": 1,
        "ema__decay": 0.9,
        "ema__use": "teacher",
        "task__distill__alpha": 0.4,
        **changes,
      },
    )

  return make


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
  """Folder of a finished run."""
  workdir = tmp_path_factory.mktemp("run")
  assert loop.train(settings(), str(workdir)) == 0
  return workdir


def state(config, workdir):
  built = loop.build(config, tokenizers.load(workdir / "tokenizer"), 6, 1)
  with jax.set_mesh(built.mesh):
    return tiny_run.flat(manager.Manager(workdir).restore(built.abstract)[0])


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
  settings, run, tmp_path, capsys, monkeypatch
):
  class Interrupt(loop.Interrupt):
    checks = 0

    @property
    def requested(self):
      Interrupt.checks += 1
      return Interrupt.checks == 4  # before the fourth update

    @requested.setter
    def requested(self, value):
      pass

  with monkeypatch.context() as patch:
    patch.setattr(loop, "Interrupt", Interrupt)
    assert loop.train(settings(), str(tmp_path)) == 0
  assert "stopped at step 3" in capsys.readouterr().out
  assert not (tmp_path / "result.json").exists()
  assert loop.train(settings(), str(tmp_path)) == 0
  out = capsys.readouterr().out
  assert "resumed at step 3" in out
  assert out.splitlines()[-1].startswith("final: accuracy ")
  assert tiny_run.lines(tmp_path) == tiny_run.lines(run)
  ours, expected = state(settings(), tmp_path), state(settings(), run)
  for name, x in expected.items():
    np.testing.assert_array_equal(ours[name], x, err_msg=name)
  assert (tmp_path / "predictions.json").read_bytes() == (run / "predictions.json").read_bytes()


def test_results_file_equals_the_predictions(files, run):
  rows, truths = (
    json.loads((run / "predictions.json").read_text()),
    json.loads((files / "nlvr_test.json").read_text()),
  )
  assert [row["id"] for row in rows] == list(range(9))
  right = []
  for row, truth in zip(rows, truths):
    assert row["scores"].keys() == {"False", "True"}
    assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert row["label"] == max(row["scores"], key=row["scores"].get)
    right.append(row["label"] == truth["label"])
  metrics = json.loads((run / "result.json").read_text())["metrics"]
  assert metrics["accuracy"] == pytest.approx(100 * np.mean(right))
  assert metrics["majority_label"] == pytest.approx(200 / 3)
  table = json.loads((run / "confusion.json").read_text())
  assert table["labels"] == ["False", "True"]
  assert np.trace(table["truth_by_prediction"]) == sum(right)
  np.testing.assert_array_equal(np.sum(table["truth_by_prediction"], axis=1), [3, 6])
  for number, label in enumerate(table["labels"]):
    counts = table["truth_by_prediction"][number]
    assert metrics[f"accuracy_{label}"] == pytest.approx(100 * counts[number] / sum(counts))
  with Image.open(run / "predictions.png") as sheet:
    assert sheet.width > 600
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100


def test_split_without_labels_gets_a_results_file(files, settings, run, tmp_path, capsys):
  rows = json.loads((files / "nlvr_test.json").read_text())
  (tmp_path / "test").mkdir()
  for row in rows[:6]:
    for image in row["images"]:
      (tmp_path / image).write_bytes((files / image).read_bytes())
  (tmp_path / rows[4]["images"][1]).write_bytes(b"cut")
  (tmp_path / "nlvr_test.json").write_text(
    json.dumps([{k: v for k, v in row.items() if k != "label"} for row in rows[:6]])
  )
  config = settings(
    data__test_file=str(tmp_path / "nlvr_test.json"), data__image_root=str(tmp_path)
  )
  assert evaluate.evaluate(config, str(tmp_path), str(run)) == {"corrupt_rows": 1}
  assert capsys.readouterr().out.splitlines()[-1] == "final: no answers to compare with"
  assert len(json.loads((tmp_path / "predictions.json").read_text())) == 6
  assert not (tmp_path / "confusion.json").exists()
  assert (tmp_path / "predictions.png").exists()


def test_subsets_of_scenes_are_reported_separately(tmp_path):
  """Predictions are right for statements about one object, and "True" for all others."""
  config = classification_run.config("nlvr2", "tiny", eval__limit=104)
  source = classification.get_source(config.data, "test")

  class Tokenizer:
    pad_id, bos_id, eos_id = 0, 1, 2

    def encode(self, text):
      return [1]

  def classify(batch):
    truth = [
      source.row(i)["label"] == "True" or "object" not in source.groups(i)
      for i in batch["index"].tolist()
    ]
    return {name: batch[name] for name in ("index", "mask", "corrupt")} | {
      "probability": np.eye(2)[np.array(truth, int)]
    }

  result = evaluator.ClassificationEvaluator(config, Tokenizer(), str(tmp_path)).run(
    {"classify": classify}
  )
  assert result["accuracy_object"] == result["accuracy_unseen"] == result["accuracy_seen"] == 100
  assert result["accuracy_relation"] == result["accuracy_count"] == result["majority_label"] == 50
  assert result["accuracy_same"] == 50
  assert result["accuracy_both"] == 75
  assert result["accuracy_True"] == 100
  expected = (
    2 * 18 + 18 + 16
  ) / 104  # four of each of 26 templates, nine of which are about one object
  assert result["accuracy"] == pytest.approx(100 * expected)


@pytest.mark.slow
def test_one_image_and_custom_classes(files, tmp_path, capsys):
  lines = [
    {
      "image": f"dev/dev-{i}-img0.png",
      "sentence": "a cat",
      "label": ["yes", "no", "perhaps"][i % 3],
    }
    for i in range(9)
  ]
  for name in ("train.jsonl", "val.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
  config = classification_run.config(
    "snli_ve",
    f"tiny,data=jsonl,root={tmp_path},labels=yes/no/perhaps",
    **{
      "data__image_root": str(files),
      "tokenizer__kind": "wordpiece",
      "tokenizer__path": str(files / "vocab.txt"),
      "compilation_cache": "",
      "data__max_text": 12,
    },
  )
  assert config.model.classes == 3
  assert config.eval.split == "val"
  assert loop.train(config, str(tmp_path / "run")) == 0
  out = capsys.readouterr().out
  assert "truth perhaps: predicted yes " in out
  assert "majority_label: 33.33" in out
  assert out.splitlines()[-1].startswith("final: accuracy ")
