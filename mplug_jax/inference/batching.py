"""Any number of rows through a few compiled shapes: images encoded once each, results for every request about them in its order.

A request is about one image or several, and has a row of arrays of its own. Rows do not see each other, so neither what stands beside a
request nor the padding changes its result.
"""

import jax
import numpy as np

from mplug_jax.parallel import batches

_FACTOR = 4  # between one compiled number of rows and the next


def sizes(limit, split):
  """Compiled numbers of rows, ascending: 1, 4, 16, ... up to `limit`, each times `split`, the devices that a batch is spread over."""
  found, rows = [], 1
  while rows * split < limit:
    found.append(rows * split)
    rows *= _FACTOR
  return (*found, -(-max(limit, 1) // split) * split)


def fitting(count, known):
  """How many of `count` rows go into one call, and its compiled size: at least half full where that is possible."""
  whole = next((size for size in known if size >= count), known[-1])
  if 2 * count >= whole or whole == known[0]:
    return min(count, whole), whole
  size = max(size for size in known if size <= count)
  return size, size


def padded(array, size):
  """[n, ...] -> [size, ...], the last row repeated."""
  return (
    array
    if len(array) == size
    else np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
  )


class Programs:
  """Predict functions, compiled when first called with a shape, and the parameters they read.

  Args:
    params: on the mesh. limit: most rows of a call.
  """

  def __init__(self, params, mesh, limit):
    self.params, self.mesh = params, mesh
    self.sizes = sizes(limit, mesh.shape["data"] * mesh.shape["fsdp"])
    self._compiled = {}

  def call(self, key, make, batch):
    """Runs the program called `key`; `make` () -> function (params, batch) of arrays, asked when it is new -> arrays on the devices."""
    if key not in self._compiled:
      self._compiled[key] = jax.jit(make())
    with jax.set_mesh(self.mesh):
      return self._compiled[key](
        self.params, jax.device_put(batch, batches.batch_sharding(self.mesh))
      )

  def rows(self, key, make, batch):
    """As `call` with numpy rows {name: [N, ...]}, in as many calls as it takes -> {name: numpy [N, ...]}."""
    count, done, found = len(next(iter(batch.values()))), 0, []
    while done < count:
      taken, size = fitting(count - done, self.sizes)
      out = self.call(
        key, make, {name: padded(x[done : done + taken], size) for name, x in batch.items()}
      )
      found.append({name: np.asarray(x)[:taken] for name, x in jax.device_get(out).items()})
      done += taken
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

  def whole(self, count):
    """The compiled size for `count` rows that must go into one call."""
    return next(
      (size for size in self.sizes if size >= count), -(-count // self.sizes[0]) * self.sizes[0]
    )

  def requests(self, images, requests, rows, encode, predict):
    """Encodes the images of requests, each once, and runs a predict function on every request.

    Args:
      images: list. requests: list of tuples of numbers of `images`, all of one length.
      rows: {name: [R, ...]}, what each request has beside its images.
      encode: function: list of images -> (tokens f[size, N, D] on the devices, {name: [n, ...]} that the images bring along).
      predict: function {name: [size, ...]} with the tokens as "image" -> {name: array [size, ...]}.

    Returns:
      {name: numpy [R, ...]} in the order of the requests.
    """
    order = sorted(range(len(requests)), key=lambda number: requests[number])
    found = []
    for numbers, members in self._blocks(order, requests):
      tokens, more = encode([images[number] for number in members])
      places = {number: place for place, number in enumerate(members)}
      at = np.array([[places[image] for image in requests[number]] for number in numbers], np.int32)
      done = 0
      while done < len(numbers):
        taken, size = fitting(len(numbers) - done, self.sizes)
        part, who = padded(at[done : done + taken], size), np.array(numbers[done : done + taken])
        batch = {name: padded(x[who], size) for name, x in rows.items()} | {
          name: x[part[:, 0]] for name, x in more.items()
        }
        out = jax.device_get(predict(batch | {"image": self._chosen(tokens, part)}))
        found.append({name: np.asarray(x)[:taken] for name, x in out.items()})
        done += taken
    back = np.argsort(order, kind="stable")
    return {name: np.concatenate([part[name] for part in found])[back] for name in found[0]}

  def _blocks(self, order, requests):
    """Yields (request numbers, numbers of their images) with as many images as go into one call."""
    left, seen, numbers, members = (
      len({image for request in requests for image in request}),
      set(),
      [],
      {},
    )
    room, _ = fitting(max(left, len(requests[0])), self.sizes)
    for number in order:
      new = [image for image in dict.fromkeys(requests[number]) if image not in members]
      if numbers and len(members) + len(new) > room:
        yield numbers, list(members)
        seen |= members.keys()
        numbers, members = [], {}
        room, _ = fitting(max(left - len(seen), len(requests[0])), self.sizes)
      numbers.append(number)
      members |= dict.fromkeys(requests[number])
    yield numbers, list(members)

  def _chosen(self, tokens, places):
    """tokens f[n, N, D], places i32[R, 1] -> f[R, N, D]; i32[R, k] -> f[R, k, N, D]."""
    index = places[:, 0] if places.shape[1] == 1 else places
    if index.shape == tokens.shape[:1] and (index == np.arange(len(index))).all():
      return tokens
    return self.call(
      "choose",
      lambda: lambda params, batch: batch["tokens"][batch["index"]],
      {"tokens": tokens, "index": index},
    )
