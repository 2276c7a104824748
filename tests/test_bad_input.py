"""Complete runs on broken data, configs and disks: one sentence per problem, nothing lost."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from mplug_jax import config as config_lib
from mplug_jax import data
from mplug_jax.data import pipeline
from mplug_jax.data.sources import vqa
from mplug_jax.data.text import wordpiece
from mplug_jax.reporting.metric_log import read_metrics
from mplug_jax.training import evaluate, loop
from tests.support import tiny_run, vqa_files, word_list
from tests.support.tiny_run import refused

pytestmark = pytest.mark.usefixtures("drawn_start")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
  """Writes data with a missing training image and a truncated validation image."""
  folder = vqa_files.write(tmp_path_factory.mktemp("broken"))
  (folder / "coco/train/4.jpg").unlink()
  image = folder / "coco/val/1.png"
  image.write_bytes(image.read_bytes()[:-600])
  return folder


@pytest.fixture(scope="module")
def run(broken, tmp_path_factory):
  """A finished run of 12 updates on broken data."""
  workdir = tmp_path_factory.mktemp("run")
  config = vqa_files.config(broken)
  assert loop.train(config, str(workdir)) == 0
  return workdir, config


# ---- images


def test_unreadable_images_are_counted_and_the_run_goes_on(run, tmp_path, capsys):
  workdir, config = run
  rows = read_metrics(workdir / "metrics.jsonl")
  images = sum(4 * row["train/corrupt_images"] for row in rows if "train/corrupt_images" in row)
  assert images in (8, 9)  # one record of eleven, in 12 batches of 8
  capsys.readouterr()
  result = evaluate.evaluate(config, str(tmp_path), str(workdir))
  assert result["corrupt_images"] == 1
  assert "  corrupt_images: 1" in capsys.readouterr().out
  predictions = json.loads((tmp_path / "predictions.json").read_text())
  assert [row["question_id"] for row in predictions] == [
    100,
    101,
    102,
    103,
    104,
  ]  # the server wants an answer to every question
  assert all(row["answer"] for row in predictions)


def test_strict_evaluation_names_the_image(run, broken, tmp_path):
  workdir, config = run
  config = config.copy_and_resolve_references()
  config.data.strict = True
  refused(
    lambda: evaluate.evaluate(config, str(tmp_path), str(workdir)),
    "Record 1 of the data",
    f"{broken}/coco/val/1.png cannot be read",
  )
  assert not (tmp_path / "predictions.json").exists()


def test_strict_training_stops_at_the_image_and_goes_on_when_it_is_there(tmp_path, capsys):
  folder = vqa_files.write(tmp_path / "data")
  workdir = tmp_path / "run"
  config = vqa_files.config(folder, data__strict=True)
  source = vqa.get(config.data, "train")
  transform = data.make_transform(
    config, wordpiece.WordPieceTokenizer(folder / "vocab.txt"), train=True
  )
  batches = pipeline.train_batches(source, transform, batch_size=8, seed=config.seed)
  first = {source[i]["image"] for i in next(batches)["index"]}
  batches.close()
  later = next(
    name
    for name in (source[i]["image"] for i in range(len(source) - 1, -1, -1))
    if name not in first
  )
  shutil.move(later, tmp_path / "kept")
  refused(lambda: loop.train(config, str(workdir)), f"Image {later} does not exist")
  capsys.readouterr()
  shutil.move(tmp_path / "kept", later)
  assert loop.train(config, str(workdir)) == 0
  assert "resumed at step 1\n" in capsys.readouterr().out


# ---- files


@pytest.mark.parametrize(
  ("name", "line", "message"),
  [
    (
      "train",
      '{"image": "a.png", "question": "Is there a dog?", "answer": "yes"',
      "line 2, column 66: not valid JSON",
    ),
    (
      "train",
      '{"image": "a.png", "question": "Is there a dog?", "answer": 3}',
      "line 2: answer must be a string or a list of strings",
    ),
    ("val", '{"image": "a.png", "answer": "yes"}', "line 2: key 'question' is missing"),
  ],
)
def test_a_wrong_line_is_located_before_anything_is_computed(broken, tmp_path, name, line, message):
  good = json.dumps(
    {"image": str(broken / "coco/train/0.jpg"), "question": "Is there a dog?", "answer": "yes"}
  )
  for split in ("train", "val"):
    (tmp_path / f"{split}.jsonl").write_text(f"{good}\n{line if split == name else good}\n")
  shutil.copy(broken / "vocab.txt", tmp_path)
  config = vqa_files.config(tmp_path, "jsonl")
  refused(lambda: loop.train(config, str(tmp_path / "run")), f"{tmp_path}/{name}.jsonl, {message}")
  assert not (tmp_path / "run" / "metrics.jsonl").exists()
  assert name == "val" or not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"data__val_file": "linked.json"},
      "config.data.train_files and config.data.val_file both name {}/linked.json: to train and "
      "validate",
    ),
    (
      {"data__test_file": "vg_qa.json"},
      "config.data.train_files and config.data.test_file both name {}/vg_qa.json: to train and "
      "test on",
    ),
    (
      {"data__val_file": "vqa_test.json"},
      "config.data.val_file and config.data.test_file both name {}/vqa_test.json: to validate",
    ),
  ],
)
def test_splits_of_one_file_are_refused_unless_the_config_says_so(
  broken, tmp_path, changes, message
):
  shutil.copytree(broken, tmp_path / "data")
  (tmp_path / "data" / "linked.json").symlink_to(tmp_path / "data" / "vqa_train.json")
  config = vqa_files.config(
    tmp_path / "data",
    **{name: f"{tmp_path}/data/{value}" for name, value in changes.items()},
  )
  refused(
    lambda: loop.train(config, str(tmp_path / "run")),
    message.format(tmp_path / "data"),
    "set config.data.allow_overlap=True",
  )
  assert not (tmp_path / "run").exists()
  config.data.allow_overlap = True
  assert len(data.get_source(config, "train")) == 11


def test_a_file_that_says_the_splits_of_its_images_serves_for_all(tmp_path):
  entry = {"filename": "a.png", "sentences": [{"raw": "it"}]}
  (tmp_path / "a.png").write_bytes(b"")
  path = tmp_path / "all.json"
  for content, allowed in (({"images": [entry | {"split": "train"}]}, True), ([entry], False)):
    path.write_text("\n" + json.dumps(content))
    config = importlib.import_module("configs.caption").get_config(
      f"tiny,data=karpathy,root={tmp_path}"
    )
    config.data.train_files = (str(path),)
    config.data.val_file = str(path)
    if allowed:
      assert len(data.get_source(config, "train")) == 1
    else:
      refused(lambda config=config: data.get_source(config, "train"), "both name")


def test_the_sentence_reaches_the_terminal(broken, tmp_path):
  (tmp_path / "train.jsonl").write_text('{"image": "a.png"\n')
  result = start(vqa_files.config(tmp_path, "jsonl"), tmp_path)
  assert result.returncode == 1
  assert (
    result.stderr
    == f"error: {tmp_path}/train.jsonl, line 1, column 18: not valid JSON (Expecting ',' "
    f"delimiter).\n"
  )


# ---- vocabulary


def test_a_vocabulary_that_does_not_fit_the_checkpoint(run, tmp_path):
  workdir, config = run
  copy = tmp_path / "run"
  shutil.copytree(workdir, copy)
  (copy / "result.json").unlink()
  other = tmp_path / "vocab.txt"
  other.write_text(word_list.text(*vqa_files.WORDS, "zebra"))
  changed = config.copy_and_resolve_references()
  changed.tokenizer.path = str(other)
  refused(
    lambda: loop.train(changed, str(copy)),
    "holds a run of another configuration",
    "tokenizer.path: ",
    "Choose another --workdir",
  )
  wordpiece.WordPieceTokenizer(other).save(copy / "tokenizer")
  refused(
    lambda: loop.train(config, str(copy)),
    "does not fit",
    "word/embedding (27, 32) in the checkpoint, (28, 32) wanted",
  )
  refused(
    lambda: evaluate.evaluate(config, str(tmp_path), str(copy)),
    "The tokenizer (28 tokens",
    "is not the one recorded in the checkpoint in",
    "use the files saved there",
  )
  shutil.rmtree(copy / "tokenizer")
  refused(
    lambda: evaluate.evaluate(config, str(tmp_path), str(copy)), f"No tokenizer in {copy}/tokenizer"
  )
  nothing = str(tmp_path / "nothing")
  refused(
    lambda: evaluate.evaluate(config, str(tmp_path), nothing),
    f"No such checkpoint or run directory: {nothing}",
  )


# ---- config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"task__name": "vqaa"}, "config.task.name='vqaa' is not a task; there are: "),
    ({"mesh__data": 3}, "does not fit 1 devices"),
    ({"mesh__data": -1, "mesh__fsdp": 0}, "does not fit 1 devices"),
    ({"model__dtype": "float8"}, "config.model.dtype='float8' is not one of float32, bfloat16"),
    ({"model__remat": "some"}, "config.model.remat='some' is not one of none, full, dots"),
    ({"model__fusion": "mine"}, "config.model.fusion='mine' is not one of released, paper"),
    ({"model__heads": 3}, "config.model.hidden_size=32 cannot be divided into 3 attention heads"),
    (
      {"model__image_size": 40},
      "config.model.image_size=40 is not a multiple of the patch size 16",
    ),
    ({"data__max_question": 65}, "Texts of 65 tokens do not fit config.model.max_positions=64"),
    ({"task__max_length": 64}, "Texts of 65 tokens do not fit config.model.max_positions=64"),
    ({"task__beam_mode": "wide"}, "unknown beam search mode 'wide'"),
    ({"task__min_length": 9}, "min_length=9"),
    ({"task__beams": 0}, "beams=0"),
    ({"task__distill__alpha": 0.4}, "config.task.distill.alpha needs a teacher"),
    (
      {"task__distill__axis": "words"},
      "config.task.distill.axis='words' is not one of vocabulary, time",
    ),
    (
      {"optim__accumulate": "sum"},
      "config.optim.accumulate='sum' is not one of global, mean_of_means",
    ),
    ({"prng_impl": "other"}, "config.prng_impl='other' is not one of hash, jax"),
    ({"optim__name": "lion"}, "'lion'"),
    ({"optim__microbatches": 3}, "config.optim.microbatches=3 does not divide config.batch_size=8"),
    ({"ema__use": "student"}, "config.ema.use='student' is not one of teacher, eval, both"),
    ({"batch_size": 0}, "config.batch_size=0 must be at least 1"),
    ({"log_every": 0}, "config.log_every=0 must be at least 1"),
    ({"checkpoint__every": 0}, "config.checkpoint.every=0 must be at least 1"),
  ],
)
def test_values_that_cannot_work_are_refused_before_training(broken, changes, message):
  config = vqa_files.config(broken, **changes)
  refused(lambda: loop.build(config, wordpiece.WordPieceTokenizer(broken / "vocab.txt")), message)


def test_a_refused_start_leaves_nothing_in_the_way(broken, tmp_path):
  """Neither the config nor the tokenizer of a start that failed binds the next one."""
  config = vqa_files.config(broken)
  config.eval.split = "tset"
  config.tokenizer.vocab_size = 7
  refused(
    lambda: loop.train(config, str(tmp_path)),
    "Split 'tset' does not exist; known splits: train, val, test.",
  )
  assert not list((tmp_path / "checkpoints").iterdir())
  assert not (tmp_path / "metrics.jsonl").exists()
  assert loop.train(vqa_files.config(broken), str(tmp_path)) == 0
  assert json.loads((tmp_path / "config.json").read_text())["tokenizer"]["vocab_size"] == 320


# ---- disk


def start(config, workdir, limit=""):
  """Runs the command line on a config, with one device, after the shell commands `limit`."""
  (workdir / "given.json").write_text(config_lib.to_json(config))
  (workdir / "given.py").write_text(
    f"from mplug_jax import config\n\ndef get_config():\n  return "
    f"config.from_json(open({str(workdir / 'given.json')!r}).read())\n"
  )
  command = [
    sys.executable,
    "tests/support/main_worker.py",
    "1",
    "0",
    f"--config={workdir}/given.py",
    f"--workdir={workdir}/run",
  ]
  return subprocess.run(
    ["bash", "-c", f'{limit}exec "$@"', "-", *command],
    cwd=tiny_run.ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(tiny_run.ROOT)},
    timeout=600,
    check=False,
  )


def test_a_full_disk_while_saving_loses_nothing(run, tmp_path, capsys):
  """A run of 12 updates continues to 20 and cannot save update 16.

  With enough space it resumes from 12.
  """
  shutil.copytree(run[0], tmp_path / "run")
  config = run[1].copy_and_resolve_references()
  config.total_steps = 20
  config.checkpoint.every = 4
  config.checkpoint.keep = 1
  result = start(config, tmp_path, limit="ulimit -f 400; ")
  assert result.returncode == 1
  assert "resumed at step 12" in result.stdout
  # TensorStore's threads may print a traceback of their own about asyncio's closed loop; ours is
  # one sentence, the last.
  assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1, result.stderr
  assert result.stderr.splitlines()[-1].startswith(
    f"error: Checkpoint 16 could not be written to {tmp_path}/run/checkpoints (File too large); "
    f"checkpoint 12 is complete. Make room"
  )
  left = {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
  assert "12" in left
  assert "16" not in left
  capsys.readouterr()
  assert loop.train(config, str(tmp_path / "run")) == 0
  assert "resumed at step 12\n" in capsys.readouterr().out
  assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} <= {"12", "20"}
  steps = [
    row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "train/loss" in row
  ]
  assert steps == [4, 8, 12, 16, 20]
  assert json.loads((tmp_path / "run/result.json").read_text())["step"] == 20
