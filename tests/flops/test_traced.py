"""Traced operations of every task's step against the products of the differentiated program."""

import functools
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from mplug_jax import tasks
from mplug_jax.data.text import tokenizer as tokenizers
from mplug_jax.data.text.stand_in_tokenizer import StandInTokenizer
from mplug_jax.flops import hardware, traced
from mplug_jax.models.factory import build_model
from mplug_jax.ops import attention
from mplug_jax.ops.attention import reference
from mplug_jax.reporting import metric_log
from mplug_jax.training import loop
from tests.flops import test_formulas
from tests.support import flop_formulas, tiny_run

TOKENIZER = StandInTokenizer(500)
_PARAMETERS = {}


@pytest.fixture(autouse=True)
def parameters_of_equal_models(monkeypatch):
  """Tasks that share a model share the trace of its parameters."""
  original = traced.abstract_parameters

  def parameters(task):
    key = type(task), task.model, str(task.config.data)
    if key not in _PARAMETERS:
      _PARAMETERS[key] = original(task)
    return _PARAMETERS[key]

  monkeypatch.setattr(traced, "abstract_parameters", parameters)


@functools.cache
def step_flops(name, changes):
  """Operations of a train step of 8 rows; `changes` are items of {key of the config: value}."""
  return traced.train_step_flops(task_of(name, **dict(changes)), 8)


def task_of(name, arg="tiny", **changes):
  c = importlib.import_module(f"configs.{name}").get_config(arg).unlock()
  c.update_from_flattened_dict({"model.image_size": 32, "data.size": 48} | changes)
  return tasks.get(c.task.name)(build_model(c, TOKENIZER), c, TOKENIZER)


def differentiated(task, rows):
  """Products of the traced loss and its gradient, without what nothing reads."""
  params, batch = traced.abstract_parameters(task), task.batch_spec(rows)

  def loss(params, averaged, extra, batch):
    state = SimpleNamespace(params=params, ema_params=averaged, extra=extra, step=jnp.int32(0))
    return sum(task.loss(params, state, batch, jax.random.key(0))[0].values())

  program = jax.make_jaxpr(jax.value_and_grad(loss))(
    params, params, jax.eval_shape(task.init_extra), batch
  )
  used, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.out_avals))
  return test_formulas.products(used)


CASES = [("vqa", {"task.distill.alpha": 0.4, "ema.decay": 0.9, "ema.use": "teacher"})]
OTHERS = [
  ("pretrain", {"task.mlm_alpha": 0.4}),
  ("nlvr2", {"model.pairing": "duplicated"}),
  ("caption", {}),
  ("caption_scst", {}),
  ("retrieval", {}),
  ("pretrain", {"task.queue": 0, "task.alpha": 0.0, "model.stride": 6}),
  ("grounding", {}),
  ("nlvr2", {}),
  ("snli_ve", {}),
]


def test_an_average_that_teaches_nothing_costs_no_forward_pass():
  without, evaluated = (
    step_flops("vqa", changes)
    for changes in ((("ema.decay", 0.0),), (("ema.decay", 0.9), ("ema.use", "eval")))
  )
  assert evaluated == without < step_flops("vqa", tuple(CASES[0][1].items()))


@pytest.mark.parametrize(
  ("name", "changes"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_a_step_has_the_products_of_its_gradient(name, changes, monkeypatch):
  counted = step_flops(name, tuple(changes.items()))
  monkeypatch.setattr(
    attention,
    "_attention",
    lambda attention_impl, *args: reference.PLAIN.forward(*args)[0],
  )
  expected = differentiated(task_of(name, **changes), 8)
  # Hard negatives are drawn by products that nothing differentiates.
  assert counted == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("fields", test_formulas.GEOMETRIES[:1])
def test_the_formulas_of_question_answering_say_the_same(fields, monkeypatch):
  task, params, _ = test_formulas.make(**fields, **test_formulas.DEPTHS)
  monkeypatch.setattr(traced, "abstract_parameters", lambda task: params)
  shape = (
    test_formulas.IMAGES,
    test_formulas.QUESTIONS,
    test_formulas.LENGTH,
    test_formulas.ANSWERS,
    test_formulas.ANSWER_LENGTH,
  )
  assert traced.train_step_flops(task, test_formulas.IMAGES) == flop_formulas.vqa_train_step(
    task.model, *shape
  )


def test_generation_counts_its_loop_as_often_as_it_runs():
  task = task_of("caption")
  model, images, beams = task.model, 4, task.config.task.beams
  for steps in (1, 6):
    memory = ((images, flop_formulas.image_tokens(model)),)
    length = len(task.prompt.start) + task.config.task.max_length
    expected = flop_formulas.image_encoder(model, images) + flop_formulas.beam_generation(
      model, memory, beams, steps, length
    )
    counted = traced.predict_flops(task, "generate", images, steps)
    assert (
      expected
      <= counted
      <= 1.1 * expected
      + flop_formulas.beam_generation(model, memory, beams, len(task.prompt.start), length)
    )


@pytest.mark.slow
def test_utilization_is_shown_where_the_peak_of_the_devices_is_known(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(hardware, "peak_flops", lambda kind: 1e9)
  c = tiny_run.config(total_steps=4, log_every=2, eval__limit=8)
  assert loop.train(c, str(tmp_path)) == 0
  rows = [row for row in metric_log.read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
  last = rows[-1]
  flops = traced.train_step_flops(
    loop.build(c, tokenizers.load(tmp_path / "tokenizer")).task, c.batch_size
  )
  assert last["train/mfu"] == pytest.approx(
    flops * last["train/steps_per_sec"] / (1e9 * len(jax.devices()))
  )
  assert last["train/data_wait_share"] + last["train/host_share"] + last[
    "train/compute_share"
  ] == pytest.approx(1.0)
  assert "MFU " in capsys.readouterr().out.split("step 4/4")[1].splitlines()[0]
