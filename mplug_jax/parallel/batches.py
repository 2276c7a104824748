"""Global batches: from each process's rows to arrays sharded over the mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mplug_jax.parallel.mesh import BATCH_AXES
from mplug_jax.parallel.rules import place


def split_rows(tree: Any, count: int, group: int = 1) -> Any:
  """Returns a tree with every array [B, ...] split into [count, B / count, ...].

  The split is strided, so that every part has rows of every device and no row changes its device.

  Args:
    tree: arrays with equal numbers of rows.
    count: number of parts.
    group: consecutive rows that stay together.
  """

  def split(x):
    x = x.reshape((-1, count, group) + x.shape[1:]).swapaxes(0, 1)
    return place(x.reshape((count, -1) + x.shape[3:]), None, BATCH_AXES)

  return jax.tree.map(split, tree)


def join_rows(tree: Any, group: int = 1, axes: tuple[str, ...] | None = BATCH_AXES) -> Any:
  """Returns the arrays that `split_rows` split.

  Args:
    tree: result of `split_rows`, or arrays like it.
    group: as of `split_rows`.
    axes: mesh axes that split the rows; None: replicated.
  """

  def join(x):
    count = len(x)
    x = x.reshape((count, -1, group) + x.shape[2:]).swapaxes(0, 1)
    return place(x.reshape((-1,) + x.shape[3:]), axes)

  return jax.tree.map(join, tree)


def batch_split(rows: int) -> int:
  """Returns the number of devices over which `constrain` splits rows; 1 outside a mesh.

  Args:
    rows: rows of the batch.
  """
  mesh = jax.sharding.get_abstract_mesh()
  split = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
  return 1 if rows % split else split


def batch_sharding(mesh: Mesh, leading: tuple[str | None, ...] = ()) -> NamedSharding:
  """Returns the sharding of a batch array, rows over the batch axes.

  Args:
    mesh: the device mesh.
    leading: mesh axes of the dimensions before the rows.
  """
  return NamedSharding(mesh, P(*leading, BATCH_AXES))


def check_rows(rows: int, mesh: Mesh, what: str) -> None:
  """Checks that rows divide over the mesh.

  Args:
    rows: rows of the batch.
    mesh: the device mesh.
    what: setting with the number of rows, for the message.

  Raises:
    ValueError: they do not.
  """
  split = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows % split:
    raise ValueError(
      f"A batch of {rows} rows cannot be split over data x fsdp = {split} devices; make {what} a "
      "multiple of it."
    )


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Returns global arrays over the mesh, rows in process order.

  Args:
    batch: tree of numpy arrays with this process's rows.
    mesh: the device mesh.

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
