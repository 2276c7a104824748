"""The device mesh, and where every array of the train state and every batch lives on it.

Axes: "data" splits the batch, "fsdp" splits the batch and the parameters, "tensor" splits heads and feed-forward units.
"""

import logging
import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
MIN_SHARD = 128  # rows of a parameter per device below which more fsdp only costs messages

# (regex on the end of the parameter path, axes of the trailing dimensions); first match wins. Depth is never sharded.
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
_said = set()


def _say_once(message):
  if message not in _said:
    _said.add(message)
    logging.warning(message)


def make_mesh(sizes, devices=None):
  """The mesh over `devices` (default: all).

  Args:
    sizes: {"data": n, "fsdp": n, "tensor": n}; one of them may be -1, the rest of the devices.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or processes would share rows of a batch.
  """
  devices = jax.devices() if devices is None else devices
  shape = [int(sizes[axis]) for axis in AXES]
  known = int(np.prod([n for n in shape if n != -1]))
  if shape.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    shape[shape.index(-1)] = len(devices) // known
  if min(shape) < 1 or int(np.prod(shape)) != len(devices):
    raise ValueError(
      f"config.mesh={dict(zip(AXES, (int(sizes[a]) for a in AXES)))} does not fit {len(devices)} devices: the sizes must "
      "multiply to that number, and one of them may be -1 for the rest."
    )
  processes = len({device.process_index for device in devices})
  if shape[0] * shape[1] % processes:
    raise ValueError(
      f"config.mesh has data x fsdp = {shape[0] * shape[1]}, which must be a multiple of the {processes} processes: each "
      "reads rows of its own, so the tensor axis has to stay inside a process."
    )
  return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def path_name(path):
  """Key path of a pytree leaf -> "params/visual_encoder/blocks/ln_1/scale"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_spec(name, shape, mesh):
  """PartitionSpec of the parameter called `name` with `shape`, by RULES.

  A dimension that its axis does not divide stays whole, and a parameter of no rule is replicated; both are said once.
  """
  axes = next((axes for regex, axes in _COMPILED if regex.fullmatch(name)), None)
  if axes is None:
    _say_once(
      f"No sharding rule matches the parameter {name}: it is replicated. Add a row to sharding.RULES if it is large."
    )
    axes = ()
  spec = [None] * (len(shape) - len(axes)) + list(axes)
  for i, axis in enumerate(spec):
    if axis is not None and shape[i] % mesh.shape[axis]:
      _say_once(
        f"{name}: dimension {i} of size {shape[i]} is not divisible by mesh axis {axis!r} of size "
        f"{mesh.shape[axis]} and stays whole."
      )
      spec[i] = None
  return P(*spec)


def shardings_for(tree, params, mesh):
  """NamedSharding of every leaf of `tree`, which may be the parameters, or hold copies of them (optimizer, EMA).

  A leaf whose path ends with a parameter's path takes that parameter's spec when its shape is equal, the spec without
  the missing dimension when it is a factored statistic of it. Columns of queues, [..., Q], are split as parameters are. Every other leaf
  is replicated.
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


def _copy_spec(shape, parameter_shape, spec):
  """Spec of a leaf that follows a parameter: equal shape, or one dimension missing."""
  if shape == parameter_shape:
    return spec
  for i in range(len(parameter_shape)):
    if shape == parameter_shape[:i] + parameter_shape[i + 1 :]:
      return P(*spec[:i], *spec[i + 1 :])
  return P()


def constrain(x):
  """Keeps the first axis of an activation split over the batch axes; does nothing outside a mesh. f[B, ...] -> f[B, ...].

  Without it XLA lets activations follow FSDP's parameters, at many times the memory traffic.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
    return x
  return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def place(x, *axes):
  """x with its leading dimensions split over these axes of the mesh, whole along the others; as it is outside a mesh."""
  return (
    x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, P(*axes))
  )


def split_rows(tree, count, group=1):
  """[B, ...] -> [count, B / count, ...] for every array, `group` consecutive rows together; strided, so that every part has rows of every
  device and no row changes its own."""

  def split(x):
    x = x.reshape((-1, count, group) + x.shape[1:]).swapaxes(0, 1)
    return place(x.reshape((count, -1) + x.shape[3:]), None, BATCH_AXES)

  return jax.tree.map(split, tree)


def join_rows(tree, group=1, axes=BATCH_AXES):
  """What `split_rows` split, its rows over `axes`; None: whole on every device."""

  def join(x):
    count = len(x)
    x = x.reshape((count, -1, group) + x.shape[2:]).swapaxes(0, 1)
    return place(x.reshape((-1,) + x.shape[3:]), axes)

  return jax.tree.map(join, tree)


def batch_split(rows):
  """Over how many devices of the current mesh `constrain` splits so many rows; 1 outside one."""
  mesh = jax.sharding.get_abstract_mesh()
  split = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
  return 1 if rows % split else split


def replicated(mesh):
  """Sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh, leading=()):
  """Sharding of a batch array, its rows over the batch axes; `leading` are axes before the rows."""
  return NamedSharding(mesh, P(*leading, BATCH_AXES))


def check_rows(rows, mesh, what):
  """Raises ValueError when `rows` rows do not divide over the mesh; `what` decides their number."""
  split = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % split:
    raise ValueError(
      f"A batch of {rows} rows cannot be split over data x fsdp = {split} devices; make {what} a "
      "multiple of it."
    )


def put_batch(batch, mesh):
  """This process's rows as numpy arrays -> global arrays over the mesh, rows in process order.

  Raises:
    ValueError: the global batch does not divide over the mesh.
  """
  check_rows(
    next(iter(jax.tree.leaves(batch))).shape[0] * jax.process_count(),
    mesh,
    "config.batch_size (and config.eval.batch_size)",
  )
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
  )
