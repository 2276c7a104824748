"""Batches any number of requests into a few compiled shapes and encodes each image once.

A request has one image or several, and a row of arrays. Rows are computed independently, so a
result depends neither on the other requests of its batch nor on the padding.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mplug_jax.parallel import batches

_FACTOR = 4  # between one compiled number of rows and the next


def sizes(limit: int, split: int) -> tuple[int, ...]:
  """Returns the compiled numbers of rows, ascending: 1, 4, 16, ... times `split` up to `limit`.

  Args:
    limit: maximum rows of a call.
    split: number of devices that a batch is sharded over.
  """
  smaller = []
  rows = 1
  while rows * split < limit:
    smaller.append(rows * split)
    rows *= _FACTOR
  return (*smaller, -(-max(limit, 1) // split) * split)


def fitting(count: int, known: Sequence[int]) -> tuple[int, int]:
  """Returns the rows of the next call and its compiled size, at least half full if possible.

  Args:
    count: remaining rows.
    known: compiled sizes, ascending.
  """
  covering = next((size for size in known if size >= count), known[-1])
  if 2 * count >= covering or covering == known[0]:
    return min(count, covering), covering
  size = max(size for size in known if size <= count)
  return size, size


def padded(array: np.ndarray, size: int) -> np.ndarray:
  """Pads [n, ...] to [size, ...] by repeating the last row."""
  return (
    array
    if len(array) == size
    else np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
  )


class Programs:
  """Compiled predict functions and their parameters.

  Attributes:
    params: parameters on the mesh.
    mesh: the mesh.
    sizes: compiled numbers of rows, ascending.
  """

  def __init__(self, params: Any, mesh: jax.sharding.Mesh, limit: int):
    """Stores the parameters.

    Args:
      params: parameters on the mesh.
      mesh: the mesh.
      limit: maximum rows of a call.
    """
    self.params = params
    self.mesh = mesh
    self.sizes = sizes(limit, mesh.shape["data"] * mesh.shape["fsdp"])
    self._compiled = {}

  def call(self, key: Hashable, make: Callable[[], Callable], batch: Mapping[str, Any]) -> Any:
    """Runs a program on a batch that fits one call.

    Args:
      key: identifies the program.
      make: returns its function (params, batch); called when the key is new.
      batch: {name: array [size, ...]}.

    Returns:
      The function's result, on the devices.
    """
    if key not in self._compiled:
      self._compiled[key] = jax.jit(make())
    with jax.set_mesh(self.mesh):
      return self._compiled[key](
        self.params, jax.device_put(batch, batches.batch_sharding(self.mesh))
      )

  def rows(
    self, key: Hashable, make: Callable[[], Callable], batch: Mapping[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    """Runs a program on any number of rows, see `call`.

    Args:
      key: identifies the program.
      make: returns its function (params, batch).
      batch: {name: [N, ...]}.

    Returns:
      {name: numpy [N, ...]}.
    """
    count = len(next(iter(batch.values())))
    done = 0
    outputs = []
    while done < count:
      taken, size = fitting(count - done, self.sizes)
      out = self.call(
        key, make, {name: padded(x[done : done + taken], size) for name, x in batch.items()}
      )
      outputs.append({name: np.asarray(x)[:taken] for name, x in jax.device_get(out).items()})
      done += taken
    return {name: np.concatenate([part[name] for part in outputs]) for name in outputs[0]}

  def whole(self, count: int) -> int:
    """Returns the compiled size for `count` rows that must go into one call."""
    return next(
      (size for size in self.sizes if size >= count), -(-count // self.sizes[0]) * self.sizes[0]
    )

  def requests(
    self,
    images: Sequence[Any],
    requests: Sequence[tuple[int, ...]],
    rows: Mapping[str, np.ndarray],
    encode: Callable,
    predict: Callable,
  ) -> dict[str, np.ndarray]:
    """Encodes the images of requests, each once, and runs a predict function on every request.

    Args:
      images: the images.
      requests: positions in `images`, tuples of one length.
      rows: {name: [R, ...]}, the other inputs of each request.
      encode: list of images -> (tokens f[size, N, D] on the devices, {name: [n, ...]} other
        inputs that come from the images).
      predict: {name: [size, ...]} with the tokens as "image" -> {name: array [size, ...]}.

    Returns:
      {name: numpy [R, ...]} in the order of the requests.
    """
    order = sorted(range(len(requests)), key=lambda number: requests[number])
    outputs = []
    for numbers, members in self._blocks(order, requests):
      tokens, more = encode([images[number] for number in members])
      positions = {number: position for position, number in enumerate(members)}
      at = np.array(
        [[positions[image] for image in requests[number]] for number in numbers], np.int32
      )
      done = 0
      while done < len(numbers):
        taken, size = fitting(len(numbers) - done, self.sizes)
        part = padded(at[done : done + taken], size)
        chosen = np.array(numbers[done : done + taken])
        batch = {name: padded(x[chosen], size) for name, x in rows.items()} | {
          name: x[part[:, 0]] for name, x in more.items()
        }
        out = jax.device_get(predict(batch | {"image": self._chosen(tokens, part)}))
        outputs.append({name: np.asarray(x)[:taken] for name, x in out.items()})
        done += taken
    back = np.argsort(order, kind="stable")
    return {name: np.concatenate([part[name] for part in outputs])[back] for name in outputs[0]}

  def _blocks(
    self, order: Sequence[int], requests: Sequence[tuple[int, ...]]
  ) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (request numbers, numbers of their images), with as many images as fit one call."""
    total = len({image for request in requests for image in request})
    encoded: set[int] = set()
    numbers: list[int] = []
    members: dict[int, None] = {}
    room, _ = fitting(max(total, len(requests[0])), self.sizes)
    for number in order:
      new = [image for image in dict.fromkeys(requests[number]) if image not in members]
      if numbers and len(members) + len(new) > room:
        yield numbers, list(members)
        encoded |= members.keys()
        numbers = []
        members = {}
        room, _ = fitting(max(total - len(encoded), len(requests[0])), self.sizes)
      numbers.append(number)
      members |= dict.fromkeys(requests[number])
    yield numbers, list(members)

  def _chosen(self, tokens: jax.Array, positions: np.ndarray) -> jax.Array:
    """Gathers image tokens.

    Args:
      tokens: f[n, N, D].
      positions: i32[R, k].

    Returns:
      f[R, N, D] for k = 1, else f[R, k, N, D].
    """
    index = positions[:, 0] if positions.shape[1] == 1 else positions
    if index.shape == tokens.shape[:1] and (index == np.arange(len(index))).all():
      return tokens
    return self.call(
      "choose",
      lambda: lambda params, batch: batch["tokens"][batch["index"]],
      {"tokens": tokens, "index": index},
    )
