"""Captioning runs of the tiny preset from files to results, and the evaluator."""

import contextlib
import io
import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from mplug_jax import data
from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.data.sources import caption
from mplug_jax.data.text import tokenizer as tokenizers
from mplug_jax.evaluators.caption import CaptionEvaluator
from mplug_jax.reporting import metric_log, progress
from mplug_jax.training import loop
from tests.support import caption_run, tiny_run

pytestmark = pytest.mark.usefixtures("drawn_start")

METRICS = {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"}
JAVA = {"METEOR", "SPICE"}  # computed where Java is


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  """Config of a short run on scenes."""
  return caption_run.config(
    **caption_run.run_settings(tmp_path_factory.mktemp("words"))
    | {"total_steps": 4, "eval__limit": 10}
  )


def run(config, workdir):
  """-> what the run printed."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    assert loop.train(config, str(workdir)) == 0
  return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
  """A finished run on scenes: (its folder, what it printed)."""
  folder = tmp_path_factory.mktemp("unbroken")
  return folder, run(settings, folder)


def _state(folder, config):
  built = loop.build(config, tokenizers.load(folder / "tokenizer"), 4, 8)
  with contextlib.closing(checkpoint.Manager(folder)) as manager:
    return tiny_run.flat(manager.restore(built.abstract)[0])


# ---- runs


def test_files_and_output_of_a_run_on_scenes(unbroken):
  folder, out = unbroken
  result = json.loads((folder / "result.json").read_text())
  assert result["metric"] == "CIDEr-D"
  assert out[-1] == f"final: CIDEr-D {result['metrics']['CIDEr-D']:.2f}"
  assert (
    METRICS
    | {
      "CIDEr-D_seen",
      "CIDEr-D_unseen",
      "shuffled_CIDEr-D",
      "another_caption_CIDEr-D",
      "another_caption_CIDEr-D_seen",
      "another_caption_CIDEr-D_unseen",
      "true",
      "true_seen",
      "true_unseen",
      "shuffled_true",
    }
    == set(result["metrics"]) - JAVA
  )
  assert result["metrics"]["another_caption_CIDEr-D"] > result["metrics"]["CIDEr-D"]
  rows = json.loads((folder / "predictions.json").read_text())
  assert [row["image_id"] for row in rows] == [f"test-{i}" for i in range(10)]
  assert all(isinstance(row["caption"], str) for row in rows)
  for name in ("METEOR", "SPICE"):  # these need Java
    assert any(line.strip().startswith(f"{name}: ") for line in out)
  assert (folder / "predictions.png").stat().st_size > 1000
  assert (folder / "curves.png").exists()
  losses = [
    row["train/loss"]
    for row in metric_log.read_metrics(folder / "metrics.jsonl")
    if "train/loss" in row
  ]
  assert len(losses) == 4
  assert losses[-1] < losses[0]


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(
  settings, unbroken, tmp_path, monkeypatch
):
  update = progress.Progress.update
  with monkeypatch.context() as patch:
    patch.setattr(
      progress.Progress,
      "update",
      lambda self, step, loss=None: (
        update(self, step, loss),
        step == 2 and loss is None and os.kill(os.getpid(), signal.SIGTERM),
      ),
    )
    assert run(settings, tmp_path)[-1].startswith("stopped at step 2")
  assert "resumed at step 2" in run(settings, tmp_path)
  ours, expected = _state(tmp_path, settings), _state(unbroken[0], settings)
  assert all(ours[name].tobytes() == x.tobytes() for name, x in expected.items())
  assert (tmp_path / "predictions.json").read_bytes() == (
    unbroken[0] / "predictions.json"
  ).read_bytes()


def test_run_on_the_official_files(tmp_path):
  caption_run.write_karpathy(tmp_path)
  (tmp_path / "caption_val.json").unlink()  # evaluated is the test split
  c = caption_run.config(
    f"tiny,data=karpathy,root={tmp_path}", **caption_run.run_settings(tmp_path)
  )
  # What a tokenizer is fitted to, unless the config names one as here.
  assert list(data.texts(c, data.get_source(c, "train"))) == [
    "a red dog, on a sign.",
    "two cats.",
    *("two cats.", "a blue sign stop", "the dog is on the cat"),
    *("a blue sign stop", "the dog is on the cat"),
  ]
  run(c, tmp_path / "run")
  assert [
    row["image_id"] for row in json.loads((tmp_path / "run/predictions.json").read_text())
  ] == [11]
  result = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
  assert METRICS | {"shuffled_CIDEr-D"} == set(result) - JAVA
  assert np.isfinite(list(result.values())).all()


# ---- the evaluator on captions given to it


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return caption_run.tokenizer(tmp_path_factory.mktemp("tokenizer"), caption_run.config())


def evaluate(c, tokenizer, workdir, captions):
  """-> (evaluator, result) for a predict function that says captions[index]."""

  def generate(batch):
    rows = [[*tokenizer.encode(captions[i]), tokenizer.eos_id] for i in batch["index"]]
    tokens = np.full((len(rows), 64), tokenizer.pad_id, np.int32)
    for row, ids in zip(tokens, rows):
      row[: len(ids)] = ids
    return {"tokens": tokens, "length": np.array([len(ids) for ids in rows])} | {
      name: batch[name] for name in ("index", "mask", "corrupt")
    }

  evaluator = CaptionEvaluator(c, tokenizer, str(workdir))
  return evaluator, evaluator.run({"generate": generate})


def test_scores_separate_right_captions_from_wrong_ones(tokenizer, tmp_path):
  c = caption_run.config(eval__limit=60)
  source = caption.images(c.data, "test")
  _, right = evaluate(c, tokenizer, tmp_path, [source.captions(i)[2] for i in range(60)])
  assert right["BLEU-4"] == pytest.approx(100)
  assert right["CIDEr-D"] > 1.5 * right["another_caption_CIDEr-D"] > 3 * right["shuffled_CIDEr-D"]
  assert right["true"] == right["true_unseen"] == 100 > 2 * right["shuffled_true"]
  _, sixth = evaluate(c, tokenizer, tmp_path, [source.another_caption(i) for i in range(60)])
  for group in ("", "_seen", "_unseen"):
    assert sixth[f"CIDEr-D{group}"] == pytest.approx(right[f"another_caption_CIDEr-D{group}"])
  _, constant = evaluate(c, tokenizer, tmp_path, ["there is a red circle"] * 60)
  assert constant["CIDEr-D"] == pytest.approx(constant["shuffled_CIDEr-D"])
  assert constant["CIDEr-D"] < right["shuffled_CIDEr-D"] * 3
  _, empty = evaluate(c, tokenizer, tmp_path, [""] * 60)
  assert empty["CIDEr-D"] == empty["true"] == 0
  assert empty["BLEU-4"] == pytest.approx(0, abs=1e-3)


def test_prompt_is_removed_from_captions(tokenizer, tmp_path):
  c = caption_run.config(task__prompt="the picture shows", eval__limit=2)
  evaluate(c, tokenizer, tmp_path, ["the picture shows a red circle", "a big star"])
  assert [row["caption"] for row in json.loads((tmp_path / "predictions.json").read_text())] == [
    "a red circle",
    "a big star",
  ]


def test_split_without_references_gets_a_results_file(tokenizer, tmp_path):
  caption_run.write_karpathy(tmp_path)
  name = tmp_path / "caption_test.json"
  name.write_text(
    json.dumps(
      [
        {k: v for k, v in entry.items() if k != "sentences"}
        for entry in json.loads(name.read_text())
      ]
    )
  )
  evaluator, result = evaluate(
    caption_run.config(f"tiny,data=karpathy,root={tmp_path}"), tokenizer, tmp_path, ["a red star"]
  )
  assert result == {}
  assert evaluator.samples == ["a red star"]
  assert json.loads((tmp_path / "predictions.json").read_text()) == [
    {"image_id": 11, "caption": "a red star"}
  ]


def test_domains_are_scored_separately_and_unreadable_images_counted(tokenizer, tmp_path):
  caption_run.write_karpathy(tmp_path)
  files = sorted((tmp_path / "val2014_img").iterdir())
  files[2].write_bytes(b"broken")
  texts = ["a red star", "a big circle", "two small stars"]
  content = {
    "images": [
      {"id": i, "file_name": file.name, "domain": ("in-domain", "out-domain")[i > 1]}
      for i, file in enumerate(files)
    ],
    "annotations": [{"image_id": i, "caption": text} for i, text in enumerate(texts)],
  }
  (tmp_path / "caption_val.json").write_text(json.dumps(content))
  c = caption_run.config(
    f"tiny,data=nocaps,root={tmp_path}", data__image_root=str(tmp_path / "val2014_img")
  )
  _, result = evaluate(c, tokenizer, tmp_path, [*texts[:2], "a square"])
  assert (
    METRICS | {"CIDEr-D_in-domain", "CIDEr-D_out-domain", "shuffled_CIDEr-D", "corrupt_images"}
    == set(result) - JAVA
  )
  assert result["corrupt_images"] == 1
  assert result["CIDEr-D_out-domain"] == 0 < result["CIDEr-D_in-domain"]


def test_nocaps_domain_scores_equal_separate_evaluations(tokenizer, tmp_path):
  """CIDEr-D, where every n-gram is in one caption alone and so weighs the same.

  In-domain: equal to the reference. Near-domain: one caption has a word too many, so that 4, 3, 2,
  1 of its 5, 4, 3, 2 n-grams are the reference's, the other shares nothing. Out of domain:
  nothing is right."""
  (tmp_path / "images").mkdir()
  domains = ["in-domain"] * 2 + ["near-domain"] * 2 + ["out-domain"] * 2
  references = [
    "a red star",
    "big blue squares",
    "small green circle",
    "two orange triangle",
    "there is one",
    "picture shows purple",
  ]
  references = [
    f"{text} {word}"
    for text, word in zip(references, ("above", "below", "left", "right", "yellow", "object"))
  ]
  said = [*references[:2], references[2] + " violet", "the", "", "of the"]
  for i in range(6):
    Image.new("RGB", (8, 8)).save(tmp_path / f"images/{i}.png")
  content = {
    "images": [
      {"id": i, "file_name": f"{i}.png", "domain": domain} for i, domain in enumerate(domains)
    ],
    "annotations": [{"image_id": i, "caption": text} for i, text in enumerate(references)],
  }
  (tmp_path / "caption_val.json").write_text(json.dumps(content))
  _, result = evaluate(
    caption_run.config(f"tiny,data=nocaps,root={tmp_path}"), tokenizer, tmp_path, said
  )
  near = np.exp(-1 / 72) * (4 / 20**0.5 + 3 / 12**0.5 + 2 / 6**0.5 + 1 / 2**0.5) / 4
  assert result["CIDEr-D_in-domain"] == pytest.approx(1000)
  assert result["CIDEr-D_near-domain"] == pytest.approx(1000 * near / 2)
  assert result["CIDEr-D_out-domain"] == 0
  assert result["CIDEr-D"] == pytest.approx(1000 * (2 + near) / 6)


def test_training_and_reported_images_differ():
  c = caption_run.config("small")
  assert c.eval.split == "test"
  assert data.get_source(c, "train").source.split == "train"
