"""Floating-point operations of train steps, predict functions and any function, by tracing them.

Only matrix products count, 2 x multiply-adds each. Tracing needs shapes alone, so that a large
model on a large batch is counted in seconds and nothing is computed. The forward pass is traced,
without rematerialization and kernels, and the backward pass follows from it: a product has a
gradient with respect to each of its operands that depends on the parameters. So the patch embedding
counts twice, most products three times, those of a teacher once, and recomputation by
rematerialization or fused attention does not count. These are the model FLOPs by which utilization
(MFU) is measured.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

from mplug_jax.ops.attention import primitive

# (operations, operations of the gradients, which outputs depend on the parameters)
_Count = tuple[int, int, list[bool]]


@runtime_checkable
class _Task(Protocol):
  """The methods of tasks.base.Task that are traced; packages of this layer import no tasks."""

  def batch_spec(self, batch_size: int) -> Any: ...
  def init(self, rng: Any, batch: Any) -> Any: ...
  def init_extra(self) -> Any: ...
  def loss(self, params: Any, state: Any, batch: Any, rng: Any) -> Any: ...
  def predict_fns(self) -> Any: ...
  def predict_sample(self, name: str, params: Any, sample: Any) -> Any: ...


def train_step_flops(task: _Task, batch_size: int) -> int:
  """Counts the forward and backward pass of a train step.

  Args:
    task: a tasks.base.Task, whose work on the host (`prepare`) does not count.
    batch_size: rows of the global batch.
  """
  params = abstract_parameters(task)
  batch = task.batch_spec(batch_size)

  def loss(params, averaged, extra, batch):
    state = SimpleNamespace(params=params, ema_params=averaged, extra=extra, step=jnp.int32(0))
    terms, _, _ = task.loss(params, state, batch, jax.random.key(0))
    return sum(terms.values())

  traced = jax.make_jaxpr(loss)(params, params, jax.eval_shape(task.init_extra), batch)
  # Without the work that only metrics need.
  used, inputs = partial_eval.dce_jaxpr(traced.jaxpr, [True])
  parameters = len(jax.tree.leaves(params))
  depends = [i < parameters for i, kept in enumerate(inputs) if kept]
  forward, backward, _ = _count(used, depends, 1)
  return forward + backward


def predict_flops(task: _Task, name: str, batch_size: int, steps: int = 1) -> int:
  """Counts a predict function.

  Args:
    task: a tasks.base.Task.
    name: name of the predict function.
    batch_size: rows of the global batch.
    steps: how often the body of a while loop runs, such as the number of generated tokens.
  """
  params = abstract_parameters(task)
  sample = task.predict_sample(name, params, task.batch_spec(batch_size))
  return function_flops(task.predict_fns()[name], params, sample, steps=steps)


def function_flops(function: Callable[..., Any], *args: Any, steps: int = 1) -> int:
  """Counts a function of arrays.

  Args:
    function: function to trace.
    *args: its arguments, pytrees of arrays or ShapeDtypeStructs.
    steps: how often the body of a while loop runs.
  """
  traced = jax.make_jaxpr(function)(*args)
  return _count(traced.jaxpr, [False] * len(traced.jaxpr.invars), steps)[0]


def abstract_parameters(task: _Task) -> Any:
  """Returns the parameters of a task as ShapeDtypeStructs.

  Args:
    task: a tasks.base.Task.
  """
  sample = task.batch_spec(1)
  return jax.eval_shape(
    lambda: task.init(
      jax.random.key(0), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sample)
    )
  )


def _count(jaxpr: core.Jaxpr, depends: Sequence[bool], steps: int) -> _Count:
  """Counts a jaxpr.

  Args:
    jaxpr: traced program.
    depends: which inputs depend on the parameters.
    steps: how often the body of a while loop runs.
  """
  known = dict(zip(jaxpr.invars, depends))

  def depends_on_parameters(variable: Any) -> bool:
    return not isinstance(variable, core.Literal) and known.get(variable, False)

  forward = 0
  backward = 0
  for equation in jaxpr.eqns:
    inputs = [depends_on_parameters(variable) for variable in equation.invars]
    operations, gradients, outputs = _count_equation(equation, inputs, steps)
    forward += operations
    backward += gradients
    for variable, value in zip(equation.outvars, outputs):
      array: Any = variable.aval
      known[variable] = value and jnp.issubdtype(array.dtype, jnp.inexact)
  return forward, backward, [depends_on_parameters(variable) for variable in jaxpr.outvars]


def _count_equation(equation: Any, inputs: list[bool], steps: int) -> _Count:
  """Counts an equation of a jaxpr, see `_count`."""
  name = equation.primitive.name
  if name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    operations = (
      2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    )
    return operations, operations * sum(inputs), [any(inputs)]
  if counter := _NESTED.get(name):
    return counter(equation, inputs, steps)
  for key in _INNER:
    if key in equation.params:
      inner = equation.params[key]
      return _count(getattr(inner, "jaxpr", inner), inputs, steps)
  depends = any(inputs) and name != "stop_gradient"
  return 0, 0, [depends] * len(equation.outvars)


def _loop(
  jaxpr: core.Jaxpr, constants: list[bool], carry: list[bool], others: list[bool], steps: int
) -> _Count:
  """Counts the body of a loop.

  A carried value depends on the parameters if it does so after any number of iterations.
  """
  while True:
    forward, backward, outputs = _count(jaxpr, constants + carry + others, steps)
    new_carry = [before or after for before, after in zip(carry, outputs)]
    if new_carry == carry:
      return forward, backward, outputs
    carry = new_carry


def _scan(equation: Any, inputs: list[bool], steps: int) -> _Count:
  body = equation.params["jaxpr"].jaxpr
  # Told by the shapes, because versions of JAX name these counts differently: arrays that are
  # scanned or stacked have one axis more outside of the body.
  carry = len(equation.outvars) - _sliced(equation.outvars, body.outvars)
  constants = len(inputs) - _sliced(equation.invars, body.invars) - carry
  parts = inputs[:constants], inputs[constants : constants + carry], inputs[constants + carry :]
  forward, backward, outputs = _loop(body, *parts, steps)
  length = equation.params["length"]
  return forward * length, backward * length, outputs


def _sliced(outside: Sequence[Any], inside: Sequence[Any]) -> int:
  """Returns how many variables have another number of axes inside the body of a scan."""
  return sum(a.aval.ndim != b.aval.ndim for a, b in zip(outside, inside, strict=True))


def _while(equation: Any, inputs: list[bool], steps: int) -> _Count:
  condition = equation.params["cond_nconsts"]
  constants = equation.params["body_nconsts"]
  body = inputs[condition : condition + constants]
  carry = inputs[condition + constants :]
  forward, backward, outputs = _loop(equation.params["body_jaxpr"].jaxpr, body, carry, [], steps)
  return forward * steps, backward * steps, outputs


def _cond(equation: Any, inputs: list[bool], steps: int) -> _Count:
  """Counts the branch with the most operations."""
  branches = [_count(branch.jaxpr, inputs[1:], steps) for branch in equation.params["branches"]]
  forward, backward = max(branch[:2] for branch in branches)
  return forward, backward, [any(values) for values in zip(*(branch[2] for branch in branches))]


def _attention(equation: Any, inputs: list[bool], steps: int) -> _Count:
  """Counts the reference, which has the operations of every form."""
  shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars]
  traced = jax.make_jaxpr(functools.partial(primitive.run_on, "", **equation.params))(*shapes)
  return _count(traced.jaxpr, inputs, steps)


_NESTED = {"scan": _scan, "while": _while, "cond": _cond, "attention": _attention}
# Parameters with the inner program of other primitives.
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
