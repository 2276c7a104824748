"""The train loop: one function for every task. `build` makes what train, evaluate and the tools share.

The loop's order defines what a step number means:
resume -> [evaluation due? -> save due or interrupted? -> next batch -> update], so that checkpoint N holds N updates and
the data stands after N batches.
"""

from concurrent.futures import ThreadPoolExecutor
import json
import os
import shutil
import time
from typing import Any, NamedTuple

from clu import parameter_overview
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from mplug_jax import (
    checkpoint, config as config_lib, data, evaluators, files, host, init_from, metrics, optim, plots, sharding, tasks,
    train_state, train_step)
from mplug_jax.data import pipeline, tokenizer as tokenizers
from mplug_jax.interrupt import Interrupt
from mplug_jax.models.mplug import MPlug


class StopTraining(RuntimeError):
  """Training cannot go on; the message says why and where the last good state is."""


class Build(NamedTuple):
  """A run without data: everything that follows from the config, the tokenizer and the devices."""
  task: Any
  mesh: Any
  schedules: dict  # {group: step -> learning rate}
  init: Any  # () -> TrainState
  abstract: Any  # TrainState of ShapeDtypeStructs with shardings
  train_step: Any  # jitted (state, batch, healthy) -> (state, metrics, health)
  predict: dict  # {name: (params, batch of this process) -> arrays of all processes' rows}


class Host(NamedTuple):
  """What `Task.prepare` may use between two updates. Every process makes the same calls."""
  predict: dict  # see Build.predict

  def own(self, rows):
    """All processes' rows of an array -> those of this process."""
    count = len(rows) // jax.process_count()
    return rows[jax.process_index() * count:][:count]


def build_model(config, tokenizer):
  """config.model -> MPlug.

  Raises:
    ValueError: the model's vocabulary is not the tokenizer's.
  """
  fields = config.model.to_dict()
  fields["vocab_size"] = fields["vocab_size"] or tokenizer.vocab_size
  if fields["vocab_size"] != tokenizer.vocab_size:
    raise ValueError(f"config.model.vocab_size={fields['vocab_size']} but the tokenizer has {tokenizer.vocab_size} tokens; set it "
                     "to 0 to follow the tokenizer, or give the vocabulary that the model was made for in config.tokenizer.path.")
  return MPlug(**fields | {"dtype": jnp.dtype(fields["dtype"]), "pad_id": tokenizer.pad_id})


def build(config, tokenizer, total_steps=10**9, steps_per_epoch=1, devices=None):
  """Config and tokenizer -> Build; computes nothing, so it also serves compilation for devices that are not there.

  The steps matter to training alone; left out they are more than any warm-up.

  Raises:
    ValueError: a value of the config that nothing can be built from; predict functions are traced, so that theirs show here too.
  """
  config_lib.check(config)
  task = tasks.get(config.task.name)(build_model(config, tokenizer), config, tokenizer)
  mesh = sharding.make_mesh(config.mesh, devices)
  parts = config.optim.microbatches
  sharding.check_rows(config.batch_size, mesh, "config.batch_size")
  sharding.check_rows(config.batch_size // parts, mesh, f"config.batch_size divided by config.optim.microbatches={parts}")
  sharding.check_rows(config.eval.batch_size, mesh, "config.eval.batch_size")
  sample = task.batch_spec(1)
  init_params = jax.jit(lambda rng: task.init(rng, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sample)))  # traced once for all
  params = jax.eval_shape(init_params, jax.random.key(0))
  optimizer, schedules = optim.make(config.optim, params, total_steps, steps_per_epoch)
  init = train_state.make_init(init_params, optimizer, task.init_extra, config.seed, config.ema.decay > 0)
  abstract = train_state.abstract_state(init, mesh)
  shardings = train_state.shardings_of(abstract)
  step = train_step.make_train_step(
      task, optimizer, microbatches=config.optim.microbatches, accumulate=config.optim.accumulate,
      ema_decay=config.ema.decay, ema_include=config.ema.include)
  for fn in task.predict_fns().values():
    jax.eval_shape(fn, params, sample)
  predict = {name: _predictor(fn, mesh) for name, fn in task.predict_fns().items()}
  return Build(task, mesh, schedules, jax.jit(init, out_shardings=shardings), abstract,
               jax.jit(step, donate_argnums=0, out_shardings=(shardings, None, None)), predict)


def _predictor(fn, mesh):
  """Jits a predict function: this process's numpy rows in, all processes' rows out, with what tells them apart."""
  jitted = jax.jit(lambda params, batch: fn(params, batch) | {name: batch[name] for name in ("index", "mask", "corrupt")})

  def predict(params, batch):
    with jax.set_mesh(mesh):
      out = jitted(params, sharding.put_batch(batch, mesh))
    return jax.tree.map(np.asarray, out if jax.process_count() == 1 else multihost_utils.process_allgather(out, tiled=True))
  return predict


def prepare_tokenizer(config, workdir, source):
  """The run's tokenizer: the one in its folder, else a given vocabulary, else one fitted to the training texts by process 0."""
  folder = os.path.join(workdir, "tokenizer")
  if jax.process_index() == 0 and not os.path.exists(os.path.join(folder, tokenizers.CONFIG_FILE)):
    kind, path = config.tokenizer.kind, config.tokenizer.path
    given = {"wordpiece": tokenizers.WordPieceTokenizer, "sentencepiece": tokenizers.SentencePieceTokenizer}
    if kind not in given:
      raise ValueError(f"config.tokenizer.kind={kind!r} is not one of {', '.join(given)}.")
    if path:
      given[kind](path).save(folder)
    elif kind == "wordpiece":
      raise ValueError("config.tokenizer.path must name the vocab.txt of a wordpiece tokenizer.")
    else:
      tokenizers.train_sentencepiece(data.texts(config, source), config.tokenizer.vocab_size, folder,
                                     tokenizers.location_names(config.tokenizer.locations))
  multihost_utils.sync_global_devices("tokenizer")
  return tokenizers.load(folder)


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
      raise ValueError(f"{workdir} holds a run of another configuration and cannot be resumed with this one ({'; '.join(refuse)}). "
                       "Choose another --workdir, or repeat the run's own settings.")
    for line in notice:
      print(f"resuming with a difference: {line}", flush=True)
  if jax.process_index() == 0:
    files.write_atomic(path, text.encode())


def _compile_step(built, batch_size):
  """Traces and compiles the train step on abstract arrays -> (compiled step, seconds it took)."""
  start = time.perf_counter()
  with jax.set_mesh(built.mesh):  # the mesh is a thread's own
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(built.mesh)),
                         built.task.batch_spec(batch_size))
    healthy = jax.ShapeDtypeStruct((), jnp.bool_, sharding=sharding.replicated(built.mesh))
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
  size = f"{(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30:.2f} GiB a device" if memory else "unknown"
  shape = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
  print(f"devices: {mesh.size} {mesh.devices.flat[0].device_kind} as {shape}; step compiled in {compile_seconds:.1f} s, needs {size}",
        flush=True)


def _bad_leaf_name(params, health):
  """Name of the first gradient leaf that is not finite."""
  number = int(health["bad_leaf"])
  if number < 0:
    return "the loss"
  return "the gradient of " + sharding.path_name(jax.tree.leaves_with_path(params)[number][0])


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
    predict = {name: lambda batch, fn=fn: fn(params, batch) for name, fn in self._predict.items()}
    return self.evaluator.run(predict, jax.process_index(), jax.process_count())


def _say_result(metric, result, samples=()):
  """A few predictions, what is worth knowing beside the metric, and the run's last line."""
  for line in samples:
    print(f"  {line}")
  for name in sorted(set(result) - {metric}):
    print(f"  {name}: {result[name]:.2f}")
  print(f"final: {metric} {result[metric]:.2f}" if metric in result else "final: no answers to compare with", flush=True)


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
  host.prepare(config.compilation_cache)
  primary = jax.process_index() == 0
  tasks.get(config.task.name)  # an unknown one is refused before anything is written
  source = data.get_source(config, "train")
  steps_per_epoch = max(1, len(source) // config.batch_size)
  total_steps = config.total_steps or int(config.total_epochs * steps_per_epoch)
  if total_steps < 1:
    raise ValueError("Set config.total_steps or config.total_epochs: the run has no updates to do.")
  os.makedirs(workdir, exist_ok=True)
  manager = checkpoint.Manager(workdir, keep=config.checkpoint.keep, best_metric=evaluators.get(config.task.name).metric)
  _open_workdir(config, workdir, resuming=manager.latest_step() is not None)
  if result := _finished(workdir, total_steps):
    print(f"{workdir} holds a finished run of {result['step']} steps; choose another --workdir to train again.")
    _say_result(result["metric"], result["metrics"])
    return 0
  tokenizer = prepare_tokenizer(config, workdir, source)

  # ---- model, optimizer, mesh, state
  built = build(config, tokenizer, total_steps, steps_per_epoch)
  evaluation = Evaluation(config, tokenizer, workdir, built)
  with jax.set_mesh(built.mesh), Interrupt() as interrupt, ThreadPoolExecutor(1) as beside:
    lowered = built.init.lower() if manager.latest_step() is None else None  # before the step's tracing, which holds Python's lock
    compilation = beside.submit(_compile_step, built, config.batch_size)  # takes as long as making the state
    if lowered:
      state, start = lowered.compile()(), 0
      if config.init.paths:
        state, origins = init_from.init_from(state, config.init)
        if primary:
          files.write_json(os.path.join(workdir, "init.json"), origins)
          print("\n".join(init_from.summary(origins)), flush=True)
    else:
      state, saved = manager.restore(built.abstract)
      start = int(state.step)
      tokenizers.check_same(tokenizer, saved["tokenizer"], f"the checkpoint in {workdir}")
      print(f"resumed at step {start}", flush=True)
    batches = pipeline.train_batches(
        source, data.make_transform(config, tokenizer, train=True), batch_size=config.batch_size, seed=config.seed,
        process_index=jax.process_index(), process_count=jax.process_count(), start_step=start,
        workers=config.loader.workers, threads=config.loader.threads)
    healthy = jax.device_put(jnp.bool_(True), sharding.replicated(built.mesh))
    if primary:
      _say_parameters(workdir, state.params)
    step_fn, compile_seconds = compilation.result()
    host.release_freed_memory()
    if primary:
      _say_step(built.mesh, compile_seconds, step_fn)

    # ---- the loop
    writer = metrics.Writer(workdir, enabled=primary, tensorboard=config.tensorboard, resume_step=start)
    progress = metrics.Progress(total_steps, enabled=primary)
    timer = metrics.StepTimer(config.batch_size)
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
          f"saved in {workdir}. A smaller config.optim.lr, gradient clipping or float32 usually helps.")

    def next_batch(step):
      try:
        with timer.data_wait():
          return next(batches)
      except Exception:
        progress.pause()
        if jax.process_count() == 1 and step > start:  # several processes do not fail at the same time, and saving takes all
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
        batch = sharding.put_batch(built.task.prepare(state, batch, Host(built.predict)), built.mesh)
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
          print(f"first step done {time.perf_counter() - start_time:.1f} s after the start", flush=True)
        timer.reset()
      else:
        timer.step()
      progress.update(step + 1)
      if (step + 1) % config.log_every == 0 or step + 1 == total_steps:
        means = metrics.reduce_metrics(jax.device_get(pending))
        pending = []
        rates = {f"lr_{name}": float(schedule(step)) for name, schedule in built.schedules.items()}
        writer.write_scalars(step + 1, {f"train/{k}": v for k, v in (means | rates | timer.report()).items()})
        progress.update(step + 1, means["loss"])

    # ---- the end
    progress.pause()
    manager.close()
    batches.close()
    writer.close()
  if primary:
    files.write_json(os.path.join(workdir, "result.json"), {"step": total_steps, "metric": evaluation.metric, "metrics": result})
    plots.curves(os.path.join(workdir, "metrics.jsonl"), os.path.join(workdir, "curves.png"))
    _say_result(evaluation.metric, result, evaluation.evaluator.samples)
  return 0


def evaluate(config, workdir, run):
  """Evaluates the weights of the run folder `run` on config.eval.split; results go to `workdir`. Returns {metric: value}.

  Raises:
    FileNotFoundError: `run` holds no tokenizer or checkpoint.
    ValueError: the checkpoint is of another model.
  """
  host.prepare(config.compilation_cache)
  tokenizer = tokenizers.load(os.path.join(run, "tokenizer"))
  tokenizers.check_same(tokenizer, checkpoint.load_extra(run)["tokenizer"], f"the checkpoint in {run}")
  built = build(config, tokenizer)
  os.makedirs(workdir, exist_ok=True)
  evaluation = Evaluation(config, tokenizer, workdir, built)
  which = "ema_params" if evaluation.weights(built.abstract) is built.abstract.ema_params else "params"
  with jax.set_mesh(built.mesh):
    params = checkpoint.load_params(run, built.abstract.params, which)
    result = evaluation.run(params)
  if jax.process_index() == 0:
    _say_result(evaluation.metric, result, evaluation.evaluator.samples)
  return result
