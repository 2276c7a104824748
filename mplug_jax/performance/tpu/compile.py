"""A run's train step or predict function, compiled for a TPU slice that is not there, and what that tells: memory, operations, time."""

import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mplug_jax.data.text.stand_in_tokenizer import StandInTokenizer
from mplug_jax.flops import traced
from mplug_jax.parallel import batches, rules
from mplug_jax.performance.tpu import hlo
from mplug_jax.training.build import build

_EFFORT = {"low": {"exec_time_optimization_effort": -1.0}, "full": {}}
_REPLICATED = (
  "texts",
)  # of what predict functions keep on the devices, what every one of them holds whole
# What the command line calls functions; every other predict function by its own name.
_FUNCTIONS = {"generate": ("generate", "locate", "classify"), "embed": ("embed_image",)}


class Report(NamedTuple):
  """Of one chip.

  `arguments`, `temporaries`, `peak`: bytes of HBM. `flops`: of the compiled products;
  `model_flops`: of the model, see task_flops.py. `traffic`: bytes of HBM. `collectives`: see
  hlo.Cost. `seconds`: {"compute", "memory", "links"} at published rates, the
  largest of which is the least that the program can take.
  """

  arguments: float
  temporaries: float
  peak: float
  flops: float
  model_flops: float
  traffic: float
  collectives: dict
  seconds: dict
  compile_seconds: float

  @property
  def bound(self):
    """The name of the largest of `seconds`."""
    return max(self.seconds, key=self.seconds.get)

  def utilisation(self, chip):
    """MFU that the bound allows: model operations over what the chip could do in that time."""
    return self.model_flops / (self.seconds[self.bound] * chip.flops)


class DoesNotFit(RuntimeError):
  """The program needs more HBM than a chip has: `needed` and `limit` bytes, as the compiler counts them."""

  def __init__(self, needed, limit):
    super().__init__(
      f"needs {needed / 2**30:.2f} GiB of HBM where {limit / 2**30:.2f} GiB can be used: "
      f"{(needed - limit) / 2**30:.2f} GiB too much"
    )
    self.needed, self.limit = needed, limit


def tokenizer_for(config):
  """A stand-in with as many tokens as the model, or the tokenizer to be fitted, would have."""
  return StandInTokenizer(config.model.vocab_size or config.tokenizer.vocab_size)


def build_for(config, devices):
  """See build.build; for abstract devices, without vocabulary or data."""
  return build(config, tokenizer_for(config), devices=devices)


def function_of(built, name):
  """The predict function that the command line calls `name`.

  Raises:
    ValueError: the task has none; lists those it has.
  """
  known = built.task.predict_fns()
  for each in _FUNCTIONS.get(name, ()) + (name,):
    if each in known:
      return each
  raise ValueError(f"--fn={name}: the task has no such function; it has train, {', '.join(known)}.")


def trace(built, config, name):
  """The train step (name "train") or a predict function, traced on abstract arrays -> jax.stages.Traced."""
  rows = batches.batch_sharding(built.mesh)
  whole = rules.replicated(built.mesh)

  def placed(tree, how):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how), tree)

  with jax.set_mesh(built.mesh):
    if name == "train":
      batch = placed(built.task.batch_spec(config.batch_size), rows)
      return built.train_step.trace(
        built.abstract, batch, jax.ShapeDtypeStruct((), jnp.bool_, sharding=whole)
      )
    name, params = function_of(built, name), built.abstract.params
    sample = built.task.predict_sample(name, params, built.task.batch_spec(config.eval.batch_size))
    batch = {
      key: placed(value, whole if key in _REPLICATED else rows) for key, value in sample.items()
    }
    return jax.jit(built.task.predict_fns()[name]).trace(params, batch)


def compile_for(config, place, name="train", effort="low"):
  """Compiles for `place`, a topology.Slice -> Report.

  Raises:
    DoesNotFit: too little HBM. ValueError: the config cannot be built, or the task has no such
      function.
  """
  built = build_for(config, place.devices)
  with jax.set_mesh(built.mesh):
    lowered = trace(built, config, name).lower()
  start = time.perf_counter()
  try:
    with jax.set_mesh(built.mesh):
      compiled = lowered.compile(compiler_options=_EFFORT[effort])
  except jax.errors.JaxRuntimeError as error:
    raise _too_large(str(error)) or error from None
  seconds = time.perf_counter() - start
  memory, found = compiled.memory_analysis(), hlo.cost(compiled.as_text())
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  peak = (
    arguments
    + temporaries
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  chip, sent = place.chip, sum(each[2] for each in found.collectives.values())
  least = {
    "compute": found.flops / chip.flops,
    "memory": found.traffic / chip.bandwidth,
    "links": sent / chip.links,
  }
  return Report(
    arguments,
    temporaries,
    peak,
    found.flops,
    model_flops(built.task, config, name) / place.chips,
    found.traffic,
    found.collectives,
    least,
    seconds,
  )


def model_flops(task, config, name):
  """Operations of the whole global batch, see task_flops.py."""
  if name == "train":
    return traced.train_step_flops(task, config.batch_size)
  steps = config.task.get("max_length", 4)  # grounding: the four coordinates
  names = [each for each in _FUNCTIONS.get(name, ()) + (name,) if each in task.predict_fns()]
  return traced.predict_flops(task, names[0], config.eval.batch_size, steps)


def _too_large(message):
  """DoesNotFit by the compiler's message about HBM, or None where it is about something else."""
  number = r"([\d.]+)([KMGT])"
  found = (
    re.search(f"Used {number} of {number} hbm", message)  # it tried to place everything
    or re.search(rf"required for .*\({number}\) exceeds available HBM \({number}\)", message)
  )  # it saw at once that it cannot
  if not found:
    return None
  unit = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
  return DoesNotFit(float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]])
