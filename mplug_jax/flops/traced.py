"""Floating-point operations of any task's train step and predict functions, counted in the traced program.

Only matrix products count, 2 x multiply-adds, as in flops.py. Tracing needs shapes alone, so a
large model on a large batch is counted in seconds and nothing is computed. The forward pass is
traced, without remat and kernels, and the backward pass follows from it: a product has a gradient
with respect to each of its operands that depends on the parameters. So the patch embedding counts
twice, most products three times, those of a teacher once, and what rematerialisation or fused
attention compute again does not count: these are the model FLOPs that utilisation (MFU) is measured
by.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval


def train_step_flops(task, batch_size):
  """Forward and backward of a global batch of so many rows -> int.

  `task`: see tasks/base.py; its host hook `prepare` does not count.
  """
  params, batch = abstract_parameters(task), task.batch_spec(batch_size)

  def loss(params, averaged, extra, batch):
    state = SimpleNamespace(params=params, ema_params=averaged, extra=extra, step=jnp.int32(0))
    terms, _, _ = task.loss(params, state, batch, jax.random.key(0))
    return sum(terms.values())

  traced = jax.make_jaxpr(loss)(params, params, jax.eval_shape(task.init_extra), batch)
  used, inputs = partial_eval.dce_jaxpr(traced.jaxpr, [True])  # without what the metrics alone read
  parameters = len(jax.tree.leaves(params))
  depends = [i < parameters for i, kept in enumerate(inputs) if kept]
  forward, backward, _ = _count(used, depends, 1)
  return forward + backward


def predict_flops(task, name, batch_size, steps=1):
  """Of the predict function `name` for a batch of so many rows -> int.

  The body of a while loop counts `steps` times, as often as
  generation takes a token.
  """
  params, sample = abstract_parameters(task), task.batch_spec(batch_size)
  traced = jax.make_jaxpr(task.predict_fns()[name])(
    params, task.predict_sample(name, params, sample)
  )
  return _count(traced.jaxpr, [False] * len(traced.jaxpr.invars), steps)[0]


def abstract_parameters(task):
  """The task's parameters as shapes."""
  sample = task.batch_spec(1)
  return jax.eval_shape(
    lambda: task.init(
      jax.random.key(0), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sample)
    )
  )


def _count(jaxpr, depends, steps):
  """(operations, operations of the gradients, which outputs depend on the parameters) of a jaxpr.

  depends: which inputs do. steps: how often the body of a while loop runs.
  """
  known = dict(zip(jaxpr.invars, depends))
  of = lambda variable: not hasattr(variable, "val") and known.get(variable, False)  # noqa: E731 - a literal has a val
  forward = backward = 0
  for equation in jaxpr.eqns:
    inputs = [of(variable) for variable in equation.invars]
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      operations = (
        2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
      )
      found = operations, operations * sum(inputs), [any(inputs)]
    elif counter := _NESTED.get(equation.primitive.name):
      found = counter(equation, inputs, steps)
    elif inner := next((equation.params[key] for key in _INNER if key in equation.params), None):
      found = _count(getattr(inner, "jaxpr", inner), inputs, steps)
    else:
      found = (
        0,
        0,
        [any(inputs) and equation.primitive.name != "stop_gradient"] * len(equation.outvars),
      )
    forward, backward = forward + found[0], backward + found[1]
    for variable, value in zip(equation.outvars, found[2]):
      known[variable] = value and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
  return forward, backward, [of(variable) for variable in jaxpr.outvars]


def _loop(jaxpr, constants, carry, others, steps):
  """`_count` of a loop's body, with what it carries depending on the parameters as soon as any turn makes it."""
  while True:
    forward, backward, outputs = _count(jaxpr, constants + carry + others, steps)
    grown = [before or after for before, after in zip(carry, outputs)]
    if grown == carry:
      return forward, backward, outputs
    carry = grown


def _scan(equation, inputs, steps):
  constants, carry = equation.params["num_consts"], equation.params["num_carry"]
  parts = inputs[:constants], inputs[constants : constants + carry], inputs[constants + carry :]
  forward, backward, outputs = _loop(equation.params["jaxpr"].jaxpr, *parts, steps)
  length = equation.params["length"]
  return forward * length, backward * length, outputs


def _while(equation, inputs, steps):
  condition, constants = equation.params["cond_nconsts"], equation.params["body_nconsts"]
  body, carry = inputs[condition : condition + constants], inputs[condition + constants :]
  forward, backward, outputs = _loop(equation.params["body_jaxpr"].jaxpr, body, carry, [], steps)
  return forward * steps, backward * steps, outputs


def _cond(equation, inputs, steps):
  """The dearest branch."""
  found = [_count(branch.jaxpr, inputs[1:], steps) for branch in equation.params["branches"]]
  return *max(each[:2] for each in found), [
    any(values) for values in zip(*(each[2] for each in found))
  ]


_NESTED = {"scan": _scan, "while": _while, "cond": _cond}
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # how other primitives call the program inside them
