"""What to change when a program does not fit, and which mesh, remat policy and microbatches are the fastest that do."""

import itertools
import math
from typing import NamedTuple

import jax

from mplug_jax import tasks
from mplug_jax.flops import traced
from mplug_jax.models import factory
from mplug_jax.performance.tpu import compile as compiler

REMAT = ("none", "dots", "full")  # from most memory and least computation on
_RECOMPUTED = {"none": 1.0, "dots": 1.1, "full": 4 / 3}  # operations, against those of the model
# Bytes that a layer keeps for each token and unit of width, in bfloat16: all activations, the
# products' outputs, the layer's input alone.
_KEPT = {"none": 60.0, "dots": 28.0, "full": 2.0}
_USABLE = 0.95  # of the HBM


class Candidate(NamedTuple):
  """Flags of the command line, {name: value}; and what the analytic model expects: bytes of a chip, seconds of a step."""

  flags: dict
  memory: float
  seconds: float

  def __str__(self):
    return " ".join(f"--config.{name}={value}" for name, value in self.flags.items())


def changed(config, flags):
  """A copy of the config with {"model.remat": ...} changed."""
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(flags)
  return config.lock()


def cheaper(config, chips):
  """Flags that need less memory than `config`, the least loss of speed first: {name: value}, each with what went before."""
  flags, out = {}, []
  for policy in REMAT[REMAT.index(config.model.remat) + 1 :]:
    flags = flags | {"model.remat": policy}
    out.append(flags)
  if config.mesh.fsdp < chips:
    flags = flags | {"mesh.data": -1, "mesh.fsdp": chips // max(1, config.mesh.tensor)}
    out.append(flags)
  rows = config.batch_size // chips
  for parts in (2, 4, 8, 16, 32, 64):
    if parts > config.optim.microbatches and rows % parts == 0:
      out.append(flags | {"optim.microbatches": parts})
  return out


def repair(config, place, name, effort, max_compiles):
  """The first of `cheaper` that compiles and fits -> (flags, Report), or None.

  What config.build refuses is passed over.
  """
  for flags in cheaper(config, place.chips):
    if max_compiles < 1:
      return None
    try:
      tried = compiler.compile_for(changed(config, flags), place, name, effort)
    except compiler.DoesNotFit:
      max_compiles -= 1
    except ValueError:
      continue
    else:
      return flags, tried
  return None


def candidates(config, place):
  """Every mesh, remat policy and number of microbatches that the analytic model believes to fit, the fastest first."""
  tokenizer = compiler.tokenizer_for(config)
  task = tasks.get(config.task.name)(factory.build_model(config, tokenizer), config, tokenizer)
  operations = compiler.model_flops(task, config, "train")
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(traced.abstract_parameters(task)))
  found = []
  for tensor, fsdp in itertools.product(
    (1, 2, 4), (n for n in range(1, place.chips + 1) if place.chips % n == 0)
  ):
    data = place.chips // (tensor * fsdp)
    if (
      data * tensor * fsdp != place.chips
      or config.batch_size % (data * fsdp)
      or config.model.heads % tensor
    ):
      continue
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
      compute = operations * _RECOMPUTED[policy] / place.chips / place.chip.flops
      found.append(
        Candidate(
          flags,
          memory,
          max(
            compute, _links(config, parameters, rows, data, fsdp, tensor, parts) / place.chip.links
          ),
        )
      )
  fits = [each for each in found if each.memory < _USABLE * place.chip.memory]
  return sorted(
    fits, key=lambda each: (each.seconds, each.flags["optim.microbatches"], each.memory)
  )


def search(config, place, effort, max_compiles, compile_for=None):
  """Compiles the most promising candidates -> [(Candidate, Report or the reason why it has none)], in the order tried.

  It stops when no candidate left can be faster, by the analytic model, than the fastest compiled
  one.
  """
  compile_for = compile_for or (
    lambda flags: compiler.compile_for(changed(config, flags), place, "train", effort)
  )
  tried, best = [], math.inf
  for each in candidates(config, place):
    if len(tried) >= max_compiles or each.seconds > best:
      break
    try:
      report = compile_for(each.flags)
      best = min(best, report.seconds[report.bound])
    except (compiler.DoesNotFit, ValueError) as error:
      report = error
    tried.append((each, report))
  return tried


def _state(config, parameters):
  """Bytes of parameters, gradients, two moments (one of muon) and averages in float32."""
  return 4.0 * parameters * (4 + (config.ema.decay > 0))


def _activations(config, rows, policy):
  """Bytes that the stacks keep for `rows` of a batch, and one layer's working set."""
  model = config.model
  image, text = (model.image_size // model.patch_size) ** 2 + 1, 32
  vision = rows * image * model.vision_width
  words = rows * text * model.hidden_size
  scores = 4.0 * rows * (model.vision_width // 64) * image * image * 2
  kept = _KEPT[policy] * (
    model.vision_layers * vision
    + (model.text_layers + model.fusion_layers + model.decoder_layers) * words
  )
  return (
    kept + (scores * model.vision_layers if policy == "none" else scores) + _KEPT["none"] * vision
  )


def _links(config, parameters, rows, data, fsdp, tensor, parts):
  """Bytes that a chip sends in a step: gradients over data, parameters over fsdp (twice) and gradients back, activations over tensor."""
  share, whole = 4.0 * parameters / tensor, lambda n: (n - 1) / n
  model = config.model
  layers = model.vision_layers + model.text_layers + model.fusion_layers + model.decoder_layers
  tokens = rows * ((model.image_size // model.patch_size) ** 2 + 1)
  tensors = 2.0 * 4 * layers * tokens * model.vision_width * whole(tensor)
  return 2 * share / fsdp * whole(data) + share * whole(fsdp) * (2 * parts / 2 + 1) + tensors
