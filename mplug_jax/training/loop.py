"""The train loop: one function for every task.

The loop's order defines what a step number means:
resume -> [evaluation due? -> save due or interrupted? -> next batch -> update], so that checkpoint N holds N updates and
the data stands after N batches.
"""

import functools
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from clu import parameter_overview
from jax.experimental import multihost_utils

from mplug_jax import config as config_lib
from mplug_jax import data, evaluators, tasks
from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.checkpoints import warm_start
from mplug_jax.data import pipeline
from mplug_jax.data.text import tokenizer as tokenizers
from mplug_jax.flops import hardware, traced
from mplug_jax.parallel import batches as batches_lib
from mplug_jax.parallel import rules
from mplug_jax.reporting import curves, metric_log
from mplug_jax.reporting import progress as progress_lib
from mplug_jax.runtime import atomic_files, process
from mplug_jax.runtime.signals import Interrupt
from mplug_jax.training import timing
from mplug_jax.training.build import Host, build


class StopTraining(RuntimeError):
  """Training cannot go on; the message says why and where the last good state is."""


def count_steps(config, source):
  """(updates of the whole run, updates of an epoch). Raises ValueError: there are none."""
  steps_per_epoch = max(1, len(source) // config.batch_size)
  total_steps = config.total_steps or int(config.total_epochs * steps_per_epoch)
  if total_steps < 1:
    raise ValueError("Set config.total_steps or config.total_epochs: the run has no updates to do.")
  return total_steps, steps_per_epoch


def prepare_tokenizer(config, workdir, source):
  """The run's tokenizer: the one in its folder, else a given vocabulary, else that of the first run in config.init.paths that has one, for
  its token embeddings are of no use with another, else one fitted to the training texts by process 0.

  Raises:
    ValueError: no vocabulary for "wordpiece", an unknown kind, or another tokenizer than that of a run in config.init.paths.
  """
  folder = os.path.join(workdir, "tokenizer")
  starts = [
    path
    for path in config.init.paths
    if os.path.exists(os.path.join(path, "tokenizer", tokenizers.CONFIG_FILE))
  ]
  if jax.process_index() == 0 and not os.path.exists(os.path.join(folder, tokenizers.CONFIG_FILE)):
    kind, path = config.tokenizer.kind, config.tokenizer.path
    given = {
      "wordpiece": tokenizers.WordPieceTokenizer,
      "sentencepiece": tokenizers.SentencePieceTokenizer,
    }
    if kind not in given:
      raise ValueError(f"config.tokenizer.kind={kind!r} is not one of {', '.join(given)}.")
    if path:
      given[kind](path).save(folder)
    elif starts:
      shutil.copytree(os.path.join(starts[0], "tokenizer"), folder)
    elif kind == "wordpiece":
      raise ValueError("config.tokenizer.path must name the vocab.txt of a wordpiece tokenizer.")
    else:
      tokenizers.train_sentencepiece(
        data.texts(config, source),
        config.tokenizer.vocab_size,
        folder,
        tokenizers.location_names(config.tokenizer.locations),
      )
  multihost_utils.sync_global_devices("tokenizer")
  tokenizer = tokenizers.load(folder)
  for path in starts:
    tokenizers.check_same(
      tokenizer,
      tokenizers.load(os.path.join(path, "tokenizer")).fingerprint,
      f"config.init.paths, {path}",
    )
  return tokenizer


def _open_workdir(config, workdir, resuming):
  """Writes config.json; compares it with the one of the run to resume, or clears what a start without a checkpoint left.

  Raises:
    ValueError: the config differs from the run's in what cannot change.
  """
  path = os.path.join(workdir, "config.json")
  text = config_lib.to_json(config)
  if not resuming:
    if jax.process_index() == 0:
      shutil.rmtree(os.path.join(workdir, "tokenizer"), ignore_errors=True)
  elif os.path.exists(path):
    with open(path) as file:
      refuse, notice = config_lib.resume_conflicts(json.load(file), json.loads(text))
    if refuse:
      raise ValueError(
        f"{workdir} holds a run of another configuration and cannot be resumed with this one ({'; '.join(refuse)}). "
        "Choose another --workdir, or repeat the run's own settings."
      )
    for line in notice:
      print(f"resuming with a difference: {line}", flush=True)
  if jax.process_index() == 0:
    atomic_files.write_atomic(path, text.encode())


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


def _finished(workdir, total_steps):
  """The result of a finished run in this folder, or None."""
  path = os.path.join(workdir, "result.json")
  if not os.path.exists(path):
    return None
  with open(path) as file:
    result = json.load(file)
  return result if result["step"] >= total_steps else None


def _say_parameters(workdir, params):
  """Prints the model's size by part; leaves the full table in parameters.txt."""
  counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
  with open(os.path.join(workdir, "parameters.txt"), "w") as file:
    file.write(parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")
  parts = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in counts.items())
  print(f"parameters: {sum(counts.values()) / 1e6:.2f} million ({parts})", flush=True)


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


class Evaluation:
  """Runs the evaluator on the weights that config.ema.use names."""

  def __init__(self, config, tokenizer, workdir, built):
    self.evaluator = evaluators.get(config.task.name)(config, tokenizer, workdir)
    self.metric, self._predict = self.evaluator.metric, built.predict
    self._averaged = config.ema.decay > 0 and config.ema.use in ("eval", "both")

  def weights(self, state):
    """The parameters to evaluate, of a TrainState."""
    return state.ema_params if self._averaged else state.params

  def run(self, params):
    """-> {metric: value}."""
    predict = {name: functools.partial(fn, params) for name, fn in self._predict.items()}
    return self.evaluator.run(predict, jax.process_index(), jax.process_count())


def _say_result(metric, result, samples=()):
  """A few predictions, what is worth knowing beside the metric, and the run's last line."""
  for line in samples:
    print(f"  {line}")
  for name in sorted(set(result) - {metric}):
    print(f"  {name}: {result[name]:.2f}")
  print(
    f"final: {metric} {result[metric]:.2f}"
    if metric in result
    else "final: no answers to compare with",
    flush=True,
  )


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
  _open_workdir(config, workdir, resuming=manager.latest_step() is not None)
  if result := _finished(workdir, total_steps):
    print(
      f"{workdir} holds a finished run of {result['step']} steps; choose another --workdir to train again."
    )
    _say_result(result["metric"], result["metrics"])
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
      tokenizers.check_same(tokenizer, saved["tokenizer"], f"the checkpoint in {workdir}")
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
      _say_parameters(workdir, state.params)
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
    _say_result(evaluation.metric, result, evaluation.evaluator.samples)
  return 0


def _tokenizer_of(config, workdir, path):
  """The tokenizer that a run carries; of a converted checkpoint the vocabulary in config.tokenizer.path, copied to `workdir`."""
  if os.path.isdir(os.path.join(path, checkpoint.DIRECTORY)):
    tokenizer = tokenizers.load(os.path.join(path, "tokenizer"))
    tokenizers.check_same(
      tokenizer, checkpoint.load_extra(path)["tokenizer"], f"the checkpoint in {path}"
    )
    return tokenizer
  checkpoint.array_shapes(path)  # whether there is a checkpoint at all
  if not config.tokenizer.path:
    raise ValueError(
      f"{path} has no tokenizer: name the vocabulary that it was trained with in config.tokenizer.path."
    )
  return prepare_tokenizer(config, workdir, None)


def evaluate(config, workdir, path):
  """Evaluates a checkpoint on config.eval.split; results go to `workdir`. Returns {metric: value}.

  Args:
    path: run folder of this task or of one that trains all its parameters (pre-training, say), or a converted checkpoint.

  Raises:
    FileNotFoundError: there is no checkpoint.
    ValueError: it is of another model, or lacks parameters or a tokenizer.
  """
  process.prepare(config.compilation_cache)
  os.makedirs(workdir, exist_ok=True)
  tokenizer = _tokenizer_of(config, workdir, path)
  built = build(config, tokenizer)
  evaluation = Evaluation(config, tokenizer, workdir, built)
  which = (
    "ema_params" if evaluation.weights(built.abstract) is built.abstract.ema_params else "params"
  )
  with jax.set_mesh(built.mesh):
    result = evaluation.run(warm_start.load_params(path, built.abstract.params, which))
  if jax.process_index() == 0:
    _say_result(evaluation.metric, result, evaluation.evaluator.samples)
  return result
