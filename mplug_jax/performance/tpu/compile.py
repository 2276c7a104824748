"""Compiles a train step or predict function for a TPU slice that is not attached.

The compiled program gives its memory, operations and a lower bound of its time.
"""

import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mplug_jax.config import Config
from mplug_jax.data.text.stand_in_tokenizer import StandInTokenizer
from mplug_jax.flops import hardware, traced
from mplug_jax.parallel import batches, rules
from mplug_jax.performance.tpu import hlo, topology
from mplug_jax.tasks.base import Task
from mplug_jax.training.build import Build, build

_EFFORT = {"low": {"exec_time_optimization_effort": -1.0}, "full": {}}
# Inputs of predict functions that every device holds in full.
_REPLICATED = ("texts",)
# Names of functions on the command line; other predict functions have the same name there.
_FUNCTIONS = {"generate": ("generate", "locate", "classify"), "embed": ("embed_image",)}


class Report(NamedTuple):
  """A compiled program, on one chip.

  Attributes:
    arguments: bytes of HBM.
    temporaries: bytes of HBM.
    peak: bytes of HBM.
    flops: operations of the compiled products.
    model_flops: operations of the model, see flops.traced.
    traffic: bytes of HBM that are read and written.
    collectives: see hlo.Cost.
    seconds: {"compute", "memory", "links"} at published rates; the largest bounds the time from
      below.
    compile_seconds: time of the compilation.
    text: the program, for `breakdown.rows`.
  """

  arguments: float
  temporaries: float
  peak: float
  flops: float
  model_flops: float
  traffic: float
  collectives: dict[str, tuple[float, float, float]]
  seconds: dict[str, float]
  compile_seconds: float
  text: str

  @property
  def bound(self) -> str:
    """Name of the largest of `seconds`."""
    return max(self.seconds, key=lambda name: self.seconds[name])

  def utilization(self, chip: hardware.Chip) -> float:
    """Returns the MFU at the bound: model operations over those that the chip can do in that time.

    Args:
      chip: kind of the chip.
    """
    return self.model_flops / (self.seconds[self.bound] * chip.flops)


class DoesNotFit(RuntimeError):
  """The program needs more HBM than a chip has.

  Attributes:
    needed: bytes, by the compiler.
    limit: bytes, by the compiler.
  """

  def __init__(self, needed: float, limit: float):
    super().__init__(
      f"needs {needed / 2**30:.2f} GiB of HBM where {limit / 2**30:.2f} GiB can be used: "
      f"{(needed - limit) / 2**30:.2f} GiB too much"
    )
    self.needed = needed
    self.limit = limit


def tokenizer_for(config: Config) -> StandInTokenizer:
  """Returns a stand-in with as many tokens as the model or the tokenizer to be fitted.

  Args:
    config: config of the run.
  """
  return StandInTokenizer(config.model.vocab_size or config.tokenizer.vocab_size)


def build_for(config: Config, devices: Sequence[Any]) -> Build:
  """Builds a run for abstract devices, without vocabulary and data, see training.build.

  Args:
    config: config of the run.
    devices: abstract JAX devices.
  """
  return build(config, tokenizer_for(config), devices=devices)


def function_of(task: Task, name: str) -> str:
  """Returns the predict function that has a name on the command line.

  Args:
    task: task of the run.
    name: name on the command line.

  Raises:
    ValueError: the task has no such function.
  """
  functions = task.predict_fns()
  for candidate in _FUNCTIONS.get(name, ()) + (name,):
    if candidate in functions:
      return candidate
  raise ValueError(
    f"--fn={name}: the task has no such function; it has train, {', '.join(functions)}."
  )


def trace(built: Build, config: Config, name: str) -> jax.stages.Traced:
  """Traces the train step or a predict function on abstract arrays.

  Args:
    built: result of `build_for`.
    config: config of the run.
    name: "train", or name of a predict function on the command line.
  """
  rows = batches.batch_sharding(built.mesh)
  replicated = rules.replicated(built.mesh)

  def placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

  with jax.set_mesh(built.mesh):
    if name == "train":
      batch = placed(built.task.batch_spec(config.batch_size), rows)
      return built.train_step.trace(
        built.abstract, batch, jax.ShapeDtypeStruct((), jnp.bool_, sharding=replicated)
      )
    name = function_of(built.task, name)
    params = built.abstract.params
    sample = built.task.predict_sample(name, params, built.task.batch_spec(config.eval.batch_size))
    batch = {
      key: placed(value, replicated if key in _REPLICATED else rows)
      for key, value in sample.items()
    }
    return jax.jit(built.task.predict_fns()[name]).trace(params, batch)


def compile_for(
  config: Config, tpu: topology.Slice, name: str = "train", effort: str = "low"
) -> Report:
  """Compiles a function for a slice.

  Args:
    config: config of the run.
    tpu: slice to compile for.
    name: "train", or name of a predict function on the command line.
    effort: optimization effort of the compiler, "low" or "full".

  Raises:
    DoesNotFit: the program needs more HBM than a chip has.
    ValueError: the config cannot be built, or the task has no such function.
  """
  built = build_for(config, tpu.devices)
  with jax.set_mesh(built.mesh):
    lowered = trace(built, config, name).lower()
  start = time.perf_counter()
  try:
    with jax.set_mesh(built.mesh):
      compiled = lowered.compile(compiler_options=_EFFORT[effort])
  except jax.errors.JaxRuntimeError as error:
    raise _too_large(str(error)) or error from None
  compile_seconds = time.perf_counter() - start
  memory: Any = compiled.memory_analysis()
  text = compiled.as_text() or ""
  cost = hlo.cost(text)
  peak = (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  return Report(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    peak=peak,
    flops=cost.flops,
    model_flops=model_flops(built.task, config, name) / tpu.chips,
    traffic=cost.traffic,
    collectives=cost.collectives,
    seconds={
      "compute": cost.flops / tpu.chip.flops,
      "memory": cost.traffic / tpu.chip.bandwidth,
      "links": sum(sent for _, _, sent in cost.collectives.values()) / tpu.chip.links,
    },
    compile_seconds=compile_seconds,
    text=text,
  )


def model_flops(task: Task, config: Config, name: str) -> int:
  """Returns the model's operations for the global batch, see flops.traced.

  Args:
    task: task of the run.
    config: config of the run.
    name: "train", or name of a predict function on the command line.
  """
  if name == "train":
    return traced.train_step_flops(task, config.batch_size)
  steps = config.task.get("max_length", 4)  # Grounding generates four coordinates.
  return traced.predict_flops(task, function_of(task, name), config.eval.batch_size, steps)


def _too_large(message: str) -> DoesNotFit | None:
  """Returns the error for a compiler's message about HBM, or None for another message."""
  number = r"([\d.]+)([KMGT])"
  # The first is the message after an attempt to place everything, the second without one.
  match = re.search(f"Used {number} of {number} hbm", message) or re.search(
    rf"required for .*\({number}\) exceeds available HBM \({number}\)", message
  )
  if not match:
    return None
  unit = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
  return DoesNotFit(float(match[1]) * unit[match[2]], float(match[3]) * unit[match[4]])
