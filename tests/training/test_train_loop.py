"""The train loop on a tiny VQA run: stop, resume, errors, guard, averages, evaluation."""

import json
import os
import shutil
import signal
import types

import jax
import numpy as np
import pytest

from mplug_jax import data, main
from mplug_jax.data import pipeline
from mplug_jax.data.sources import vqa as sources
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.parallel import batches as batch_lib
from mplug_jax.training import health, loop
from tests.support import random_state, tiny_run
from tests.support.train_case import (
  EVALUATED,
  SETTINGS,
  STEPS,
  assert_same_run,
  poison,
  run,
  saved_state,
  send_at,
)

pytestmark = pytest.mark.usefixtures("recorded")


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
  """A run of STEPS updates without interruption: (folder, what it printed)."""
  folder = tmp_path_factory.mktemp("unbroken")
  status, out = run(settings(), folder)
  assert status == 0
  return folder, out


def test_what_a_run_prints_and_leaves(settings, unbroken):
  folder, out = unbroken
  assert {p.name for p in folder.iterdir()} == {
    "config.json",
    "tokenizer",
    "checkpoints",
    "metrics.jsonl",
    "parameters.txt",
    "predictions.json",
    "predictions.png",
    "curves.png",
    "result.json",
  }
  rows = tiny_run.lines(folder)
  assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
  assert [row["step"] for row in rows if "test/accuracy" in row] == [3, 6]
  assert all(
    row["train/loss_answer"] == pytest.approx(row["train/loss"], rel=1e-6)
    for row in rows
    if "train/loss" in row
  )
  result = json.loads((folder / "result.json").read_text())
  assert result["step"] == STEPS
  assert result["metrics"]["accuracy"] == rows[-1]["test/accuracy"]
  assert out.splitlines()[-1] == f"final: accuracy {result['metrics']['accuracy']:.2f}"
  assert "devices: 1 cpu as data 1 x fsdp 1 x tensor 1" in out
  assert "parameters: 0.21 million" in out
  questions = sum(len(source) for source in [json.loads((folder / "predictions.json").read_text())])
  assert questions >= 10
  assert json.loads((folder / "config.json").read_text()) == json.loads(
    settings().to_json_best_effort()
  )


@pytest.fixture(scope="module")
def resumed(settings, stopped, tmp_path_factory):
  """The stopped run, resumed and finished: (folder, what it printed, parameters evaluated last)."""
  folder = shutil.copytree(stopped[0], tmp_path_factory.mktemp("resumed") / "run")
  before = tiny_run.lines(folder)
  assert [row["step"] for row in before] == [1, 2, 3, 3]
  assert not (folder / "result.json").exists()
  status, out = run(settings(), folder)
  assert status == 0
  return folder, out, tiny_run.flat(EVALUATED[-1])


def test_sigterm_stops_and_the_resumed_run_is_the_unbroken_one_bit_for_bit(
  settings, unbroken, stopped, resumed
):
  assert stopped[1].splitlines()[-1] == "stopped at step 3; the same command resumes from there"
  folder, out, _ = resumed
  assert "resumed at step 3" in out
  assert "difference" not in out
  assert out.splitlines()[-1] == unbroken[1].splitlines()[-1]
  assert_same_run(settings(), folder, unbroken[0])


def test_a_run_starts_from_another(settings, unbroken, tmp_path):
  c = settings(init__paths=(str(unbroken[0]),), total_steps=1)
  status, out = run(c, tmp_path)
  assert status == 0
  assert f"text_decoder: 36 parameters from {unbroken[0]}" in out
  assert set(json.loads((tmp_path / "init.json").read_text()).values()) == {str(unbroken[0])}
  first, last = (tiny_run.lines(unbroken[0])[i]["train/loss"] for i in (0, -2))
  # It starts where the other ended.
  assert abs(tiny_run.lines(tmp_path)[0]["train/loss"] - last) < 0.3 * abs(first - last)


def test_ctrl_c_before_the_first_update(settings, unbroken, tmp_path, monkeypatch):
  say = loop.report_step
  with monkeypatch.context() as patch:
    patch.setattr(
      loop, "report_step", lambda *args: (say(*args), os.kill(os.getpid(), signal.SIGINT))
    )
    status, out = run(settings(), tmp_path)
  assert status == 0
  assert out.splitlines()[-1] == "stopped at step 0; the same command resumes from there"
  status, out = run(settings(), tmp_path)
  assert status == 0
  assert "resumed at step 0" in out
  assert_same_run(settings(), tmp_path, unbroken[0])


def test_a_signal_during_the_last_update_finishes_the_run(settings, copy, unbroken, monkeypatch):
  """With the trace of the profiler beside it, whose window a resumed run may start in."""
  send_at(monkeypatch, signal.SIGTERM, STEPS)
  status, out = run(settings(profile_steps=(1, 5)), copy)
  assert status == 0
  assert out.splitlines()[-1].startswith("final: accuracy")
  assert "resuming with a difference: profile_steps" in out
  assert_same_run(settings(), copy, unbroken[0])


def test_profiling_leaves_a_trace_of_the_chosen_updates(settings, copy):
  assert run(settings(profile_steps=(4, 5)), copy)[0] == 0
  assert list((copy / "profile").rglob("*.xplane.pb"))


def test_a_finished_run_is_reported_and_not_repeated(settings, unbroken):
  folder, out = unbroken
  before = {
    p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "config.json"
  }
  status, again = run(settings(), folder)
  assert status == 0
  assert (
    again.splitlines()[0]
    == f"{folder} holds a finished run of 6 steps; choose another --workdir to train again."
  )
  assert again.splitlines()[-1] == out.splitlines()[-1]
  assert {
    p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "config.json"
  } == before


# ---- the guard


def test_a_gradient_that_is_not_finite_stops_the_run(
  settings, stopped, unbroken, tmp_path, monkeypatch
):
  """The message names step and leaf, the state before the step is saved, and a repaired run resumes
  from it.
  """
  with monkeypatch.context() as patch:
    poison(patch, 4)
    with pytest.raises(health.StopTraining) as error:
      run(settings(), tmp_path)
  first = next(
    iter(k for k in saved_state(settings(), tmp_path)[0] if k.startswith("params/"))
  ).removeprefix("params/")
  message = str(error.value)
  assert message.startswith(f"Step 4: the gradient of {first} is not finite, so training stopped;")
  assert f"the state after step 3 is saved in {tmp_path}." in message
  state, extra = saved_state(settings(), tmp_path)
  expected, _ = saved_state(settings(), stopped[0])
  assert extra["step"] == 3
  for name, x in expected.items():
    assert state[name].tobytes() == x.tobytes(), name
    assert not np.issubdtype(x.dtype, np.floating) or np.isfinite(state[name]).all(), name
  assert run(settings(), tmp_path)[0] == 0
  assert_same_run(settings(), tmp_path, unbroken[0])


def test_the_guard_watches_the_last_update_and_the_program_says_so(
  settings, tmp_path, monkeypatch, capsys
):
  poison(monkeypatch, STEPS)
  assert _main(monkeypatch, settings(), workdir=tmp_path) == 1
  (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
  assert line.startswith("error: Step 6: the gradient of")
  assert "the state after step 5 is saved" in line
  assert not (tmp_path / "result.json").exists()
  assert saved_state(settings(), tmp_path)[1]["step"] == 5


# ---- averages and distillation


def test_the_averaged_weights_are_evaluated(settings, resumed):
  folder, _, evaluated = resumed
  state, _ = saved_state(settings(), folder)
  different = 0
  for name, x in evaluated.items():
    np.testing.assert_array_equal(x, state[f"ema_params/{name}"])
    different += not np.array_equal(x, state[f"params/{name}"])
  assert different > 0.9 * len(evaluated)


def test_the_teacher_of_distillation_is_the_average(settings, unbroken):
  """The loss of update 3 is recomputed from the state before it; alpha is 0.4 from step 1 on."""
  c = settings(
    task__distill__alpha=0.4, ema__use="both", model__vision_layers=1, model__fusion_layers=1
  )
  tokenizer = tokenizer_lib.load(unbroken[0] / "tokenizer")
  built = loop.build(c, tokenizer, STEPS, 500)
  batches = pipeline.train_batches(
    sources.get(c.data, "train"),
    data.make_transform(c, tokenizer, train=True),
    batch_size=8,
    seed=c.seed,
    threads=0,
  )
  state = random_state.Init(built, c.model.initializer_range, c.seed)()
  healthy = True
  for _ in range(3):
    batch = next(batches)
    # Copies, because the step donates the state.
    params, ema_params = jax.tree.map(np.array, (state.params, state.ema_params))
    state, metrics, health = built.train_step(
      state, batch_lib.put_batch(batch, built.mesh), healthy
    )
    healthy = health["ok"]
  batches.close()
  total, count = metrics["loss"]
  distilled = float(total / count)
  key = jax.random.fold_in(jax.random.fold_in(state.rng, 2), 0)
  logits = jax.jit(
    lambda params, batch, rng: built.task.apply(params, built.task.forward, batch, rng=rng)
  )
  student, teacher = (
    np.asarray(x, np.float64)[:, :-1]
    for x in (logits(params, batch, key), logits(ema_params, batch, None))
  )
  log_student, log_teacher = (
    x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (student, teacher)
  )
  ids = batch["answer"].reshape(-1, batch["answer"].shape[-1])[:, 1:]
  hard = -np.take_along_axis(log_student, ids[..., None], -1)[..., 0]
  soft = -(np.exp(log_teacher) * log_student).sum(-1)

  def loss(alpha):
    tokens = np.where(ids != tokenizer.pad_id, (1 - alpha) * hard + alpha * soft, 0.0).sum(-1)
    return (batch["answer_weight"].ravel() * tokens).sum() / batch["question_valid"].sum()

  assert distilled == pytest.approx(loss(0.4), rel=1e-5)
  assert distilled != pytest.approx(loss(0.0), rel=1e-3)  # the teacher is another model


# ---- evaluation and the program


def _main(monkeypatch, config, workdir, mode="train", checkpoint=""):
  """Exit status of mplug_jax.main with these flags."""
  for name, value in dict(
    CONFIG=config, _WORKDIR=str(workdir), _MODE=mode, _CHECKPOINT=str(checkpoint)
  ).items():
    monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
  monkeypatch.setattr(main, "_COORDINATOR", types.SimpleNamespace(value=""))
  try:
    main.main(["main"])
  except SystemExit as stop:
    return stop.code
  return 0


def test_evaluating_a_finished_run_repeats_its_result(
  settings, unbroken, tmp_path, monkeypatch, capsys
):
  """In a separate folder, on eight devices; the length of the schedule does not matter there."""
  c = settings(optim__schedule__warmup_steps=200, total_steps=1000, mesh__data=8)
  assert _main(monkeypatch, c, tmp_path, mode="evaluate", checkpoint=unbroken[0]) == 0
  assert capsys.readouterr().out.splitlines()[-1] == unbroken[1].splitlines()[-1]
  assert (tmp_path / "predictions.json").read_bytes() == (
    unbroken[0] / "predictions.json"
  ).read_bytes()


def test_evaluation_says_what_does_not_fit(settings, unbroken, tmp_path, monkeypatch, capsys):
  assert (
    _main(monkeypatch, settings(), tmp_path, mode="evaluate", checkpoint=tmp_path / "nothing") == 1
  )
  assert str(tmp_path / "nothing") in capsys.readouterr().err
  assert (
    _main(
      monkeypatch, settings(model__mlp_dim=128), tmp_path, mode="evaluate", checkpoint=unbroken[0]
    )
    == 1
  )
  (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
  assert "does not fit this configuration" in line


def test_a_process_stopped_by_sigterm_is_resumed_bit_for_bit(settings, unbroken, tmp_path):
  """A separate process gets SIGTERM and this one resumes its run: equal to the unbroken run."""
  process = tiny_run.start(tmp_path, SETTINGS, use=1, sleep=0.5)
  tiny_run.wait_for_lines(tmp_path / "metrics.jsonl", 2, process)
  process.send_signal(signal.SIGTERM)
  last = tiny_run.finish(process)[-1]
  assert (
    2
    <= int(
      last.removeprefix("stopped at step ").removesuffix("; the same command resumes from there")
    )
    < STEPS
  )
  assert run(settings(), tmp_path)[0] == 0
  assert_same_run(settings(), tmp_path, unbroken[0])
