"""Evaluation during training and of checkpoints alone."""

import functools
import os

import jax

from mplug_jax import evaluators
from mplug_jax.checkpoints import manager, reading, warm_start
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.data.text import tokenizer_base
from mplug_jax.runtime import process
from mplug_jax.training.build import build
from mplug_jax.training.workdir import prepare_tokenizer


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


def report_result(metric, result, samples=()):
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


def _tokenizer_of(config, workdir, path):
  """The tokenizer that a run carries.

  Of a converted checkpoint the vocabulary in config.tokenizer.path, copied to `workdir`.
  """
  if os.path.isdir(os.path.join(path, manager.DIRECTORY)):
    tokenizer = tokenizer_lib.load(os.path.join(path, "tokenizer"))
    tokenizer_base.check_same(
      tokenizer, reading.load_extra(path)["tokenizer"], f"the checkpoint in {path}"
    )
    return tokenizer
  reading.array_shapes(path)  # whether there is a checkpoint at all
  if not config.tokenizer.path:
    raise ValueError(
      f"{path} has no tokenizer: name the vocabulary that it was trained with in "
      f"config.tokenizer.path."
    )
  return prepare_tokenizer(config, workdir, None)


def evaluate(config, workdir, path):
  """Evaluates a checkpoint on config.eval.split; results go to `workdir`. Returns {metric: value}.

  Args:
    path: run folder of this task or of one that trains all its parameters (pre-training, say), or a
      converted checkpoint.

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
    report_result(evaluation.metric, result, evaluation.evaluator.samples)
  return result
