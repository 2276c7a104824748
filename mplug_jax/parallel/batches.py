"""Global batches: from each process's rows to arrays sharded over the mesh."""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mplug_jax.parallel.mesh import BATCH_AXES
from mplug_jax.parallel.rules import place


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
