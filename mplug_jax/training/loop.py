"""The train loop: one function for every task.

The order of the loop defines what a step number means: resume, then repeatedly
[evaluation due? -> save due or interrupted? -> next batch -> step]. Checkpoint N holds N steps, and
the data position after N batches.
"""

import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp

from mplug_jax import config as config_lib
from mplug_jax import data, evaluators, tasks
from mplug_jax.checkpoints.manager import Manager
from mplug_jax.config import Config
from mplug_jax.data import pipeline
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.data.types import Source
from mplug_jax.parallel import batches as batches_lib
from mplug_jax.parallel import rules
from mplug_jax.reporting import curves
from mplug_jax.runtime import atomic_files, files, process
from mplug_jax.runtime.signals import Interrupt
from mplug_jax.training import data_fingerprint
from mplug_jax.training.build import Build, Host, build
from mplug_jax.training.evaluate import Evaluation, report_result
from mplug_jax.training.health import HealthGuard
from mplug_jax.training.start import count_steps, report_step, start_state, warn_about_data
from mplug_jax.training.state import TrainState
from mplug_jax.training.step_log import MetricLog
from mplug_jax.training.workdir import (
  finished_result,
  open_workdir,
  prepare_tokenizer,
  report_parameters,
)


def train(config: Config, workdir: str) -> int:
  """Trains and evaluates; resumes when `workdir` holds a run.

  Writes to `workdir`: config.json, data.json, tokenizer/, checkpoints/, metrics.jsonl,
  parameters.txt, predictions.json, predictions.png, curves.png, result.json.

  Args:
    config: config of the run.
    workdir: run folder.

  Returns:
    The exit status.

  Raises:
    ValueError, FileNotFoundError: the config or the data cannot be used.
    StopTraining: a loss or gradient was not finite; the last good state is saved.
    CheckpointError: a checkpoint could not be written.
  """
  began = time.perf_counter()
  process.prepare(config.compilation_cache)
  config_lib.check(config)  # Raises before anything is written, as the next line does.
  tasks.get(config.task.name)
  source = data.get_source(config, "train")
  total_steps, steps_per_epoch = count_steps(config, source)
  files.make_folder(workdir)
  manager = _manager(config, workdir)
  open_workdir(config, workdir, resuming=manager.latest_step() is not None)
  if finished := finished_result(workdir, total_steps):
    return _report_finished(workdir, finished)
  data_fingerprint.check(config, workdir, source, manager.latest_step() is not None)
  tokenizer = prepare_tokenizer(config, workdir, source)
  built = build(config, tokenizer, total_steps, steps_per_epoch)
  evaluation = Evaluation(config, tokenizer, workdir, built.predict)
  warn_about_data(config, "train", source)
  with jax.set_mesh(built.mesh), Interrupt() as interrupt, ExitStack() as stack:
    executor = stack.enter_context(ThreadPoolExecutor(1))
    state, start, compilation = start_state(config, workdir, built, manager, tokenizer, executor)
    batches = _batches(config, source, tokenizer, start)
    healthy = jax.device_put(jnp.bool_(True), rules.replicated(built.mesh))
    step_fn = _compiled(workdir, built, state, compilation)
    log = MetricLog(config, workdir, built, total_steps, start, began)
    stack.callback(log.close)  # Also after an error, for lines that are not in an object store yet.
    guard = HealthGuard(manager, tokenizer, workdir, start)

    for step in range(start, total_steps + 1):
      at_end = step == total_steps
      result = {}
      if at_end or _due(step, start, config.eval.every):
        guard.check(state)
        with log.paused():
          result = evaluation.run(evaluation.weights(state))
        log.evaluated(step, result)
      stop = interrupt.requested if jax.process_count() == 1 else manager.reached_preemption(step)
      if stop or at_end or _due(step, start, config.checkpoint.every):
        guard.check(state)
        with log.timer.paused():
          log.flush()  # A resumed run repeats only the lines after the checkpoint.
          guard.save(step, state, result)
      if stop or at_end:
        break
      log.profile_from(step)
      with guard.saving_on_error(step, state), log.waiting_for_data():
        batch = next(batches)
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        with log.timer.host():
          batch = built.task.prepare(state, batch, Host(built.predict))
          batch = batches_lib.put_batch(batch, built.mesh)
        guard.check(state)  # of the previous step, while this one's batch was made
        state, step_metrics, health = step_fn(state, batch, healthy)
      guard.health = health
      healthy = health["ok"]
      log.stepped(step, step_metrics, state)

    manager.close()
    batches.close()
  if not at_end:
    print(f"stopped at step {step}; the same command resumes from there", flush=True)
  elif jax.process_index() == 0:
    _write_result(workdir, total_steps, evaluation, result)
  return 0


def _manager(config: Config, workdir: str) -> Manager:
  """Returns the Manager of the run's checkpoints."""
  best_metric = evaluators.get(config.task.name).metric
  return Manager(workdir, keep=config.checkpoint.keep, best_metric=best_metric)


def _due(step: int, start: int, every: int) -> bool:
  """Returns whether something that happens every `every` steps, 0 = never, happens now."""
  return bool(every) and step > start and step % every == 0


def _batches(config: Config, source: Source, tokenizer: Tokenizer, start: int) -> Any:
  """Returns this process's rows of the training batches from step `start` on."""
  return pipeline.train_batches(
    source,
    data.make_transform(config, tokenizer, train=True),
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    start_step=start,
    workers=config.loader.workers,
    threads=config.loader.threads,
    block=config.data.shuffle_block,
  )


def _compiled(
  workdir: str,
  built: Build,
  state: TrainState,
  compilation: Future[tuple[jax.stages.Compiled, float]],
) -> jax.stages.Compiled:
  """Waits for the compiled step; reports the size of the model and the memory of the step."""
  primary = jax.process_index() == 0
  if primary:
    report_parameters(workdir, state.params)
  step_fn, compile_seconds = compilation.result()
  process.release_freed_memory()
  if primary:
    report_step(built.mesh, step_fn, compile_seconds)
  return step_fn


def _report_finished(workdir: str, finished: Mapping[str, Any]) -> int:
  """Prints the result of a finished run; returns the exit status."""
  print(
    f"{workdir} holds a finished run of {finished['step']} steps; "
    "choose another --workdir to train again."
  )
  report_result(finished["metric"], finished["metrics"])
  return 0


def _write_result(
  workdir: str, total_steps: int, evaluation: Evaluation, result: Mapping[str, float]
) -> None:
  """Writes result.json and curves.png; prints the result."""
  values = {"step": total_steps, "metric": evaluation.metric, "metrics": result}
  atomic_files.write_json(os.path.join(workdir, "result.json"), values)
  curves.curves(os.path.join(workdir, "metrics.jsonl"), os.path.join(workdir, "curves.png"))
  report_result(evaluation.metric, result, evaluation.evaluator.samples)
