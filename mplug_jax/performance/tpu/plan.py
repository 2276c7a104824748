"""Plans a train step for a slice: changes that make it fit, and the fastest settings that fit."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from mplug_jax import tasks
from mplug_jax.config import Config
from mplug_jax.flops import traced
from mplug_jax.models import factory
from mplug_jax.performance.geometry import image_tokens
from mplug_jax.performance.tpu import compile as compiler
from mplug_jax.performance.tpu.topology import Slice

# From most memory and least computation to the opposite.
REMAT = ("none", "dots", "full")
# Operations relative to those of the model.
_RECOMPUTED = {"none": 1.0, "dots": 1.1, "full": 4 / 3}
# Bytes that a layer keeps for each token and unit of width, in bfloat16: all activations, the
# outputs of the products, only the input of the layer.
_KEPT = {"none": 60.0, "dots": 28.0, "full": 2.0}
_USABLE = 0.95  # share of the HBM
_TEXT_TOKENS = 32  # tokens of a typical text


class Candidate(NamedTuple):
  """Settings of a train step and their expected cost.

  Attributes:
    flags: {name: value} of the command line.
    memory: expected bytes of a chip.
    seconds: expected time of a step.
  """

  flags: dict[str, Any]
  memory: float
  seconds: float

  def __str__(self) -> str:
    return " ".join(f"--config.{name}={value}" for name, value in self.flags.items())


def changed(config: Config, flags: Mapping[str, Any]) -> Config:
  """Returns a copy of the config with some settings changed.

  Args:
    config: config of the run.
    flags: {"model.remat": value, ...}.
  """
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(dict(flags))
  return config.lock()


def cheaper(config: Config, chips: int) -> list[dict[str, Any]]:
  """Returns flags that need less memory, the least loss of speed first.

  Args:
    config: config of the run.
    chips: chips of the slice.

  Returns:
    {name: value} of each step, which includes those of the steps before it.
  """
  flags: dict[str, Any] = {}
  steps = []
  for policy in REMAT[REMAT.index(config.model.remat) + 1 :]:
    flags = flags | {"model.remat": policy}
    steps.append(flags)
  if config.mesh.fsdp < chips:
    flags = flags | {"mesh.data": -1, "mesh.fsdp": chips // max(1, config.mesh.tensor)}
    steps.append(flags)
  rows = config.batch_size // chips
  microbatches = (
    parts
    for parts in (2, 4, 8, 16, 32, 64)
    if parts > config.optim.microbatches and rows % parts == 0
  )
  return steps + [flags | {"optim.microbatches": parts} for parts in microbatches]


def repair(
  config: Config, tpu: Slice, name: str, effort: str, max_compiles: int
) -> tuple[dict[str, Any], compiler.Report] | None:
  """Finds the first flags of `cheaper` with which a function fits.

  Flags that the config cannot be built with are skipped.

  Args:
    config: config of the run.
    tpu: slice to compile for.
    name: "train", or name of a predict function on the command line.
    effort: optimization effort of the compiler, "low" or "full".
    max_compiles: number of compilations to try.

  Returns:
    The flags and the report, or None.
  """
  for flags in cheaper(config, tpu.chips):
    if max_compiles < 1:
      return None
    try:
      report = compiler.compile_for(changed(config, flags), tpu, name, effort)
    except compiler.DoesNotFit:
      max_compiles -= 1
    except ValueError:
      continue
    else:
      return flags, report
  return None


def candidates(config: Config, tpu: Slice) -> list[Candidate]:
  """Returns the settings that fit by the analytic model, the fastest first.

  Settings are every mesh, remat policy and number of microbatches.

  Args:
    config: config of the run.
    tpu: slice to plan for.
  """
  tokenizer = compiler.tokenizer_for(config)
  task = tasks.get(config.task.name)(factory.build_model(config, tokenizer), config, tokenizer)
  operations = compiler.model_flops(task, config, "train")
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(traced.abstract_parameters(task)))
  fitting = []
  for data, fsdp, tensor in _meshes(config, tpu.chips):
    rows = config.batch_size // (data * fsdp)
    for policy, parts in itertools.product(REMAT, (1, 2, 4, 8, 16)):
      if rows % parts:
        continue
      flags = {
        "mesh.data": data,
        "mesh.fsdp": fsdp,
        "mesh.tensor": tensor,
        "model.remat": policy,
        "optim.microbatches": parts,
      }
      memory = (
        _state(config, parameters) / (fsdp * tensor)
        + _activations(config, rows / parts, policy) / tensor
      )
      compute = operations * _RECOMPUTED[policy] / tpu.chips / tpu.chip.flops
      links = _links(config, parameters, rows, data, fsdp, tensor, parts) / tpu.chip.links
      if memory < _USABLE * tpu.chip.memory:
        fitting.append(Candidate(flags, memory, max(compute, links)))
  return sorted(fitting, key=lambda c: (c.seconds, c.flags["optim.microbatches"], c.memory))


def _meshes(config: Config, chips: int) -> Iterator[tuple[int, int, int]]:
  """Yields (data, fsdp, tensor) of the meshes over which batch and heads divide."""
  divisors = [n for n in range(1, chips + 1) if chips % n == 0]
  for tensor, fsdp in itertools.product((1, 2, 4), divisors):
    data = chips // (tensor * fsdp)
    fits_chips = data * tensor * fsdp == chips
    if fits_chips and config.batch_size % (data * fsdp) == 0 and config.model.heads % tensor == 0:
      yield data, fsdp, tensor


def search(
  config: Config,
  tpu: Slice,
  effort: str,
  max_compiles: int,
  compile_for: Callable[[dict[str, Any]], compiler.Report] | None = None,
) -> list[tuple[Candidate, compiler.Report | Exception]]:
  """Compiles the most promising candidates.

  Stops when by the analytic model no further candidate can be faster than the fastest compiled one.

  Args:
    config: config of the run.
    tpu: slice to plan for.
    effort: optimization effort of the compiler, "low" or "full".
    max_compiles: number of compilations to try.
    compile_for: function flags -> report, which compiles by default.

  Returns:
    Candidates in the order tried, with their report or the error of their compilation.
  """
  compile_for = compile_for or (
    lambda flags: compiler.compile_for(changed(config, flags), tpu, "train", effort)
  )
  tried: list[tuple[Candidate, compiler.Report | Exception]] = []
  best = math.inf
  for candidate in candidates(config, tpu):
    if len(tried) >= max_compiles or candidate.seconds > best:
      break
    try:
      report = compile_for(candidate.flags)
    except (compiler.DoesNotFit, ValueError) as error:
      tried.append((candidate, error))
    else:
      best = min(best, report.seconds[report.bound])
      tried.append((candidate, report))
  return tried


def _state(config: Config, parameters: int) -> float:
  """Returns the bytes of float32 parameters, gradients, two moments (one of Muon) and averages."""
  copies = 5 if config.ema.decay > 0 else 4
  return 4.0 * parameters * copies


def _activations(config: Config, rows: float, policy: str) -> float:
  """Returns the bytes of the stacks' activations and of the working set of a layer."""
  model = config.model
  image = image_tokens(model)
  vision = rows * image * model.vision_width
  words = rows * _TEXT_TOKENS * model.hidden_size
  scores = 4.0 * rows * (model.vision_width // 64) * image * image * 2
  kept = _KEPT[policy] * (
    model.vision_layers * vision
    + (model.text_layers + model.fusion_layers + model.decoder_layers) * words
  )
  return (
    kept + (scores * model.vision_layers if policy == "none" else scores) + _KEPT["none"] * vision
  )


def _links(
  config: Config, parameters: int, rows: int, data: int, fsdp: int, tensor: int, parts: int
) -> float:
  """Returns the bytes that a chip sends in a step.

  Gradients over data, parameters over fsdp (twice) and gradients back, activations over tensor.
  """

  def sent(devices: int) -> float:
    return (devices - 1) / devices

  share = 4.0 * parameters / tensor
  model = config.model
  layers = model.vision_layers + model.text_layers + model.fusion_layers + model.decoder_layers
  tokens = rows * image_tokens(model)
  activations = 2.0 * 4 * layers * tokens * model.vision_width * sent(tensor)
  return 2 * share / fsdp * sent(data) + share * sent(fsdp) * (2 * parts / 2 + 1) + activations
