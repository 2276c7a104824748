"""The train loop: one function for every task.

The loop's order defines what a step number means:
resume -> [evaluation due? -> save due or interrupted? -> next batch -> update], so that checkpoint N holds N updates and
the data stands after N batches.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from mplug_jax import data, evaluators, tasks
from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.checkpoints import warm_start
from mplug_jax.data import pipeline
from mplug_jax.data.text import tokenizer_base
from mplug_jax.flops import hardware, traced
from mplug_jax.parallel import batches as batches_lib
from mplug_jax.parallel import rules
from mplug_jax.reporting import curves, metric_log
from mplug_jax.reporting import progress as progress_lib
from mplug_jax.runtime import atomic_files, process
from mplug_jax.runtime.signals import Interrupt
from mplug_jax.training import timing
from mplug_jax.training.build import Host, build
from mplug_jax.training.evaluate import Evaluation, report_result
from mplug_jax.training.workdir import (
  finished_result,
  open_workdir,
  prepare_tokenizer,
  report_parameters,
)


class StopTraining(RuntimeError):
  """Training cannot go on; the message says why and where the last good state is."""


def count_steps(config, source):
  """(updates of the whole run, updates of an epoch). Raises ValueError: there are none."""
  steps_per_epoch = max(1, len(source) // config.batch_size)
  total_steps = config.total_steps or int(config.total_epochs * steps_per_epoch)
  if total_steps < 1:
    raise ValueError("Set config.total_steps or config.total_epochs: the run has no updates to do.")
  return total_steps, steps_per_epoch


def compile_step(built, batch_size):
  """Traces and compiles the train step on abstract arrays -> (compiled step, seconds it took)."""
  start = time.perf_counter()
  with jax.set_mesh(built.mesh):  # the mesh is a thread's own
    batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=batches_lib.batch_sharding(built.mesh)
      ),
      built.task.batch_spec(batch_size),
    )
    healthy = jax.ShapeDtypeStruct((), jnp.bool_, sharding=rules.replicated(built.mesh))
    compiled = built.train_step.lower(built.abstract, batch, healthy).compile()
  return compiled, time.perf_counter() - start


def _say_step(mesh, compile_seconds, step):
  """Prints the devices and what the compiled step needs of them."""
  memory = step.memory_analysis()
  size = (
    f"{(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30:.2f} GiB a device"
    if memory
    else "unknown"
  )
  shape = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
  print(
    f"devices: {mesh.size} {mesh.devices.flat[0].device_kind} as {shape}; step compiled in {compile_seconds:.1f} s, needs {size}",
    flush=True,
  )


def _bad_leaf_name(params, health):
  """Name of the first gradient leaf that is not finite."""
  number = int(health["bad_leaf"])
  if number < 0:
    return "the loss"
  return "the gradient of " + rules.path_name(jax.tree.leaves_with_path(params)[number][0])


def train(config, workdir):
  """Trains and evaluates; resumes when `workdir` holds a run. Returns the exit status.

  Leaves in `workdir`: config.json, tokenizer/, checkpoints/, metrics.jsonl, parameters.txt, predictions.json,
  predictions.png, curves.png, result.json.

  Raises:
    ValueError, FileNotFoundError: the config or the data cannot be used; one sentence.
    StopTraining: a loss or gradient was not finite; the last good state is saved.
    checkpoint.CheckpointError: a checkpoint could not be written.
  """
  # ---- data and tokenizer
  start_time = time.perf_counter()
  process.prepare(config.compilation_cache)
  primary = jax.process_index() == 0
  tasks.get(config.task.name)  # an unknown one is refused before anything is written
  source = data.get_source(config, "train")
  total_steps, steps_per_epoch = count_steps(config, source)
  os.makedirs(workdir, exist_ok=True)
  manager = checkpoint.Manager(
    workdir, keep=config.checkpoint.keep, best_metric=evaluators.get(config.task.name).metric
  )
  open_workdir(config, workdir, resuming=manager.latest_step() is not None)
  if result := finished_result(workdir, total_steps):
    print(
      f"{workdir} holds a finished run of {result['step']} steps; choose another --workdir to train again."
    )
    report_result(result["metric"], result["metrics"])
    return 0
  tokenizer = prepare_tokenizer(config, workdir, source)

  # ---- model, optimizer, mesh, state
  built = build(config, tokenizer, total_steps, steps_per_epoch)
  evaluation = Evaluation(config, tokenizer, workdir, built)
  with jax.set_mesh(built.mesh), Interrupt() as interrupt, ThreadPoolExecutor(1) as beside:
    lowered = (
      built.init.lower() if manager.latest_step() is None else None
    )  # before the step's tracing, which holds Python's lock
    compilation = beside.submit(
      compile_step, built, config.batch_size
    )  # takes as long as making the state
    if lowered:
      state, start = lowered.compile()(), 0
      if config.init.paths:
        state, origins = warm_start.init_from(state, config.init)
        if primary:
          atomic_files.write_json(os.path.join(workdir, "init.json"), origins)
          print("\n".join(warm_start.summary(origins)), flush=True)
    else:
      state, saved = manager.restore(built.abstract)
      start = int(state.step)
      tokenizer_base.check_same(tokenizer, saved["tokenizer"], f"the checkpoint in {workdir}")
      print(f"resumed at step {start}", flush=True)
    batches = pipeline.train_batches(
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
    healthy = jax.device_put(jnp.bool_(True), rules.replicated(built.mesh))
    if primary:
      report_parameters(workdir, state.params)
    step_fn, compile_seconds = compilation.result()
    process.release_freed_memory()
    if primary:
      _say_step(built.mesh, compile_seconds, step_fn)

    # ---- the loop
    writer = metric_log.Writer(
      workdir, enabled=primary, tensorboard=config.tensorboard, resume_step=start
    )
    progress = progress_lib.Progress(total_steps, enabled=primary)
    peak = hardware.peak_flops(built.mesh.devices.flat[0].device_kind)
    timer = timing.StepTimer(
      config.batch_size,
      flops=traced.train_step_flops(built.task, config.batch_size) if peak else 0,
      peak=peak and peak * built.mesh.size,
    )
    pending, health, result = [], None, {}

    def save(step, result):
      manager.save(step, state, {"step": step, "tokenizer": tokenizer.fingerprint}, result)

    def check_health():
      if health is None or bool(health["ok"]):
        return
      good = int(state.step)
      save(good, {})
      manager.close()
      raise StopTraining(
        f"Step {good + 1}: {_bad_leaf_name(state.params, health)} is not finite, so training stopped; the state after step {good} is "
        f"saved in {workdir}. A smaller config.optim.lr, gradient clipping or float32 usually helps."
      )

    def next_batch(step):
      try:
        with timer.data_wait():
          return next(batches)
      except Exception:
        progress.pause()
        if (
          jax.process_count() == 1 and step > start
        ):  # several processes do not fail at the same time, and saving takes all
          check_health()
          save(step, {})
        manager.close()
        raise

    for step in range(start, total_steps + 1):
      at_end = step == total_steps
      result = {}
      if at_end or (config.eval.every and step % config.eval.every == 0 and step > start):
        check_health()
        progress.pause()
        with timer.paused():
          result = evaluation.run(evaluation.weights(state))
        writer.write_scalars(step, {f"{config.eval.split}/{k}": v for k, v in result.items()})
        if primary and not at_end:
          print(f"step {step}: {', '.join(f'{k} {v:.2f}' for k, v in result.items())}", flush=True)
      stop = interrupt.requested if jax.process_count() == 1 else manager.reached_preemption(step)
      if stop or at_end or (step > start and step % config.checkpoint.every == 0):
        check_health()
        with timer.paused():
          save(step, result)
      if stop and not at_end:
        manager.close()
        batches.close()
        writer.close()
        progress.pause()
        print(f"stopped at step {step}; the same command goes on from there", flush=True)
        return 0
      if at_end:
        break
      if max(start, config.profile_steps[0]) == step < config.profile_steps[1]:
        jax.profiler.start_trace(os.path.join(workdir, "profile"))
      batch = next_batch(step)
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        with timer.host():
          batch = batches_lib.put_batch(
            built.task.prepare(state, batch, Host(built.predict)), built.mesh
          )
        check_health()  # of the update before, while this one's batch was made
        state, step_metrics, health = step_fn(state, batch, healthy)
      healthy = health["ok"]
      pending.append(step_metrics)
      if step + 1 == config.profile_steps[1]:
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
      if step == start:
        jax.block_until_ready(health)
        if primary:
          print(
            f"first step done {time.perf_counter() - start_time:.1f} s after the start", flush=True
          )
        timer.reset()
      else:
        timer.step()
      progress.update(step + 1)
      if (step + 1) % config.log_every == 0 or step + 1 == total_steps:
        means = timing.reduce_metrics(jax.device_get(pending))
        pending = []
        rates = {f"lr_{name}": float(schedule(step)) for name, schedule in built.schedules.items()}
        speed = timer.report()
        writer.write_scalars(
          step + 1, {f"train/{k}": v for k, v in (means | rates | speed).items()}
        )
        progress.mfu = speed.get("mfu")
        progress.update(step + 1, means["loss"])

    # ---- the end
    progress.pause()
    manager.close()
    batches.close()
    writer.close()
  if primary:
    atomic_files.write_json(
      os.path.join(workdir, "result.json"),
      {"step": total_steps, "metric": evaluation.metric, "metrics": result},
    )
    curves.curves(os.path.join(workdir, "metrics.jsonl"), os.path.join(workdir, "curves.png"))
    report_result(evaluation.metric, result, evaluation.evaluator.samples)
  return 0
