"""Sharding rules of parameters and activations over the device mesh.

The axis "data" splits the batch, "fsdp" splits the batch and the parameters, "tensor" splits heads
and feed-forward units.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from mplug_jax.parallel.mesh import BATCH_AXES

MIN_SHARD = 128  # rows of a parameter per device below which more fsdp only costs messages

# (regex on the end of the parameter path, axes of the trailing dimensions); first match wins.
# Depth is never sharded.
RULES = (
  (r"(query|key|value|up|intermediate)/kernel", ("fsdp", "tensor")),
  (r"cls_head/out/kernel", ("fsdp", None)),  # a column for each class
  (r"(out|down|output)/kernel", ("tensor", "fsdp")),
  (r"(query|key|value|up|intermediate)/bias", ("tensor",)),
  (r"word/embedding", ("tensor", "fsdp")),
  (r"(position|token_type)/embedding|position_embedding", (None, "fsdp")),
  (r"(patch_embed|visn_fc|dense|vision_proj|text_proj|itm_head)/kernel", ("fsdp", None)),
  (r"class_embedding|scale|bias|temp/value", ()),
)


_COMPILED = tuple((re.compile(rf"(.*/)?({regex})"), axes) for regex, axes in RULES)

_warnings: set[str] = set()


def _warn_once(message: str) -> None:
  """Logs a warning unless it was logged before."""
  if message not in _warnings:
    _warnings.add(message)
    logging.warning(message)


def path_name(path: tuple[Any, ...]) -> str:
  """Returns the name of a pytree leaf, such as "params/visual_encoder/blocks/ln_1/scale".

  Args:
    path: key path, as jax.tree.leaves_with_path gives it.
  """
  return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_spec(name: str, shape: Sequence[int], mesh: Mesh) -> P:
  """Returns the PartitionSpec of a parameter by RULES.

  A dimension that its axis does not divide is not split, and a parameter without a rule is
  replicated; both are logged once.

  Args:
    name: path of the parameter.
    shape: shape of the parameter.
    mesh: the device mesh, or an abstract one.
  """
  axes = next((axes for regex, axes in _COMPILED if regex.fullmatch(name)), None)
  if axes is None:
    _warn_once(
      f"No sharding rule matches the parameter {name}: it is replicated. Add a row to "
      "parallel.rules.RULES if it is large."
    )
    axes = ()
  spec = [None] * (len(shape) - len(axes)) + list(axes)
  for i, axis in enumerate(spec):
    if axis is not None and shape[i] % mesh.shape[axis]:
      _warn_once(
        f"{name}: dimension {i} of size {shape[i]} is not divisible by mesh axis {axis!r} of size "
        f"{mesh.shape[axis]} and stays whole."
      )
      spec[i] = None
  return P(*spec)


def shardings_for(tree: Any, params: Any, mesh: Mesh) -> Any:
  """Returns the NamedSharding of every leaf.

  A leaf whose path ends with a parameter's path takes that parameter's spec when its shape is
  equal, the spec without the missing dimension when it is a factored statistic of it. Columns of
  queues, [..., Q], are split over "fsdp". Every other leaf is replicated.

  Args:
    tree: the parameters, or a tree with copies of them (optimizer, EMA).
    params: the parameters.
    mesh: the device mesh.
  """
  specs = {
    path_name(path): (leaf.shape, parameter_spec(path_name(path), leaf.shape, mesh))
    for path, leaf in jax.tree.leaves_with_path(params)
  }

  def leaf_sharding(path, leaf):
    parts = path_name(path).split("/")
    if parts[-1].endswith("_queue") and leaf.shape[-1] % mesh.shape["fsdp"] == 0:
      return NamedSharding(mesh, P(*[None] * (len(leaf.shape) - 1), "fsdp"))
    match = next(
      (specs[name] for i in range(len(parts)) if (name := "/".join(parts[i:])) in specs), None
    )
    return NamedSharding(mesh, _copy_spec(leaf.shape, *match) if match else P())

  return jax.tree.map_with_path(leaf_sharding, tree)


def _copy_spec(shape: tuple[int, ...], parameter_shape: tuple[int, ...], spec: P) -> P:
  """Returns the spec of a leaf that follows a parameter: equal shape, or one dimension missing."""
  if shape == parameter_shape:
    return spec
  for i in range(len(parameter_shape)):
    if shape == parameter_shape[:i] + parameter_shape[i + 1 :]:
      return P(*spec[:i], *spec[i + 1 :])
  return P()


def constrain(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
  """Returns an activation with rows split over the batch axes; unchanged outside a mesh.

  Without it XLA lets activations follow FSDP's parameters, at many times the memory traffic.

  Args:
    x: activation; the first dimension has the rows of the batch.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
    return x
  return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def place(
  x: Shaped[Array, "*shape"], *axes: str | tuple[str, ...] | None
) -> Shaped[Array, "*shape"]:
  """Returns `x` with leading dimensions split over mesh axes; unchanged outside a mesh.

  Args:
    x: any array.
    *axes: mesh axes of each leading dimension; None: not split.
  """
  return (
    x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P(*axes))
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds in full.

  Args:
    mesh: the device mesh.
  """
  return NamedSharding(mesh, P())
