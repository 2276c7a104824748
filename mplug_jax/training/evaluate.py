"""Evaluates a run during training, or a checkpoint alone."""

import functools
import os
from collections.abc import Iterable, Mapping

import jax
from absl import logging

from mplug_jax import config as config_lib
from mplug_jax import evaluators
from mplug_jax.checkpoints import manager, reading, warm_start
from mplug_jax.config import Config
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.data.text import tokenizer_base
from mplug_jax.runtime import files, process
from mplug_jax.tasks.base import Params
from mplug_jax.training.build import Predictor, build_for_evaluation
from mplug_jax.training.start import warn_about_data
from mplug_jax.training.state import TrainState
from mplug_jax.training.workdir import prepare_tokenizer


class Evaluation:
  """Runs the evaluator of the task on parameters or their averages, as config.ema.use says.

  Attributes:
    evaluator: evaluator of the task.
    metric: name of the metric by which the best checkpoint is kept.
  """

  def __init__(
    self,
    config: Config,
    tokenizer: tokenizer_base.Tokenizer,
    workdir: str,
    predict: Mapping[str, Predictor],
  ):
    """Makes the evaluator and logs what is implausible about its data.

    Args:
      config: config of the run.
      tokenizer: tokenizer of the run.
      workdir: folder for results.
      predict: see training.build.Build.
    """
    if note := config_lib.split_note(config):
      logging.warning("%s", note)
    self.evaluator = evaluators.get(config.task.name)(config, tokenizer, workdir)
    warn_about_data(config, config.eval.split, getattr(self.evaluator, "source", ()))
    self.metric: str = self.evaluator.metric
    self._predict = predict
    self._averaged = config.ema.decay > 0 and config.ema.use in ("eval", "both")

  def weights(self, state: TrainState) -> Params:
    """Returns the parameters to evaluate.

    Args:
      state: state with parameters and averages.
    """
    return state.ema_params if self._averaged else state.params

  def run(self, params: Params) -> dict[str, float]:
    """Evaluates parameters.

    Args:
      params: parameters on the mesh.

    Returns:
      {metric: value}.
    """
    predict = {name: functools.partial(fn, params) for name, fn in self._predict.items()}
    return self.evaluator.run(predict, jax.process_index(), jax.process_count())


def report_result(
  metric: str, result: Mapping[str, float | None], samples: Iterable[str] = ()
) -> None:
  """Prints a few predictions, the other metrics, and the metric of the run in the last line.

  Args:
    metric: name of the metric of the task.
    result: {metric: value, None if it is not finite}.
    samples: lines with predictions.
  """
  for line in samples:
    print(f"  {line}")
  for name in sorted(set(result) - {metric}):
    print(f"  {name}: {_shown(result[name])}")
  print(
    f"final: {metric} {_shown(result[metric])}"
    if metric in result
    else "final: no answers to compare with",
    flush=True,
  )


def _shown(value: float | None) -> str:
  """Returns a metric as text; result.json has null for one that is not finite."""
  return "not finite" if value is None else f"{value:.2f}"


def _tokenizer_of(config: Config, workdir: str, path: str) -> tokenizer_base.Tokenizer:
  """Returns the tokenizer of a run.

  Of a converted checkpoint it is the vocabulary in config.tokenizer.path, copied to `workdir`.
  """
  if files.open_path(os.path.join(path, manager.DIRECTORY)).is_dir():
    tokenizer = tokenizer_lib.load(os.path.join(path, "tokenizer"))
    tokenizer_base.check_same(
      tokenizer, reading.load_extra(path)["tokenizer"], f"the checkpoint in {path}"
    )
    return tokenizer
  reading.array_shapes(path)  # Raises if there is no checkpoint.
  if not config.tokenizer.path:
    raise ValueError(
      f"{path} has no tokenizer: name the vocabulary that it was trained with in "
      "config.tokenizer.path."
    )
  return prepare_tokenizer(config, workdir, None)


def evaluate(config: Config, workdir: str, path: str) -> dict[str, float]:
  """Evaluates a checkpoint on config.eval.split and writes the results to `workdir`.

  Args:
    config: config of the evaluation.
    workdir: folder for results.
    path: run folder of this task or of one that trains all its parameters (such as pre-training),
      or a converted checkpoint.

  Returns:
    {metric: value}.

  Raises:
    FileNotFoundError: there is no checkpoint.
    ValueError: the checkpoint is of another model, or lacks parameters or a tokenizer.
  """
  config_lib.check(config)
  process.prepare(config.compilation_cache)
  files.make_folder(workdir)
  tokenizer = _tokenizer_of(config, workdir, path)
  built = build_for_evaluation(config, tokenizer)
  evaluation = Evaluation(config, tokenizer, workdir, built.predict)
  averaged = evaluation.weights(built.abstract) is built.abstract.ema_params
  which = "ema_params" if averaged else "params"
  with jax.set_mesh(built.mesh):
    result = evaluation.run(warm_start.load_params(path, built.abstract.params, which))
  if jax.process_index() == 0:
    report_result(evaluation.metric, result, evaluation.evaluator.samples)
  return result
