"""Batching into a few compiled shapes: every image once, the results in order."""

import jax
import numpy as np
import pytest

from mplug_jax.inference import batching as batches
from mplug_jax.parallel import mesh as mesh_lib


def test_compiled_sizes():
  assert batches.sizes(64, 1) == (1, 4, 16, 64)
  assert batches.sizes(20, 1) == (1, 4, 16, 20)
  assert batches.sizes(1, 1) == (1,)
  assert batches.sizes(64, 8) == (8, 32, 64)
  assert batches.sizes(3, 2) == (2, 4)


@pytest.mark.parametrize(
  ("count", "expected"),
  [
    (1, (1, 1)),
    (2, (2, 4)),
    (5, (4, 4)),
    (9, (9, 16)),
    (20, (16, 16)),
    (40, (40, 64)),
    (100, (64, 64)),
  ],
)
def test_calls_are_at_least_half_full(count, expected):
  assert batches.fitting(count, (1, 4, 16, 64)) == expected


@pytest.mark.parametrize(("limit", "width"), [(1, 1), (4, 1), (16, 1), (4, 2), (1, 2)])
def test_requests_come_back_in_order_and_images_are_encoded_once(limit, width):
  mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
  programs = batches.Programs({"scale": jax.numpy.float32(2)}, mesh, limit)
  rng = np.random.default_rng(0)
  encoded = []
  calls = []
  images = list(range(11))
  requests = [tuple(map(int, rng.choice(11, width, replace=False))) for _ in range(23)]

  def encode(members):
    encoded.extend(members)
    size = programs.whole(len(members))
    tokens = programs.call(
      "encode",
      lambda: lambda params, batch: params["scale"] * batch["x"][:, None, None],
      {"x": batches.padded(np.array(members, np.float32), size)},
    )
    return tokens, {"seen": np.array(members)}

  def predict(batch):
    calls.append(len(batch["row"]))
    weights = np.arange(1, width + 1)
    return {
      "out": np.asarray(batch["image"]).reshape(-1, width) @ weights + 100 * batch["row"],
      "seen": batch["seen"],
    }

  out = programs.requests(images, requests, {"row": np.arange(23)}, encode, predict)
  assert out["out"].tolist() == [
    sum(2 * image * (i + 1) for i, image in enumerate(r)) + 100 * n for n, r in enumerate(requests)
  ]
  assert out["seen"].tolist() == [request[0] for request in requests]
  assert set(calls) <= set(programs.sizes)
  if width == 1:
    assert sorted(encoded) == sorted({image for request in requests for image in request})


def test_rows_in_several_calls():
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 1, "tensor": 1}, jax.devices()[:2])
  programs = batches.Programs({}, mesh, 4)
  x = np.arange(11.0)
  assert (
    programs.rows("double", lambda: lambda params, batch: {"y": 2 * batch["x"]}, {"x": x})["y"]
    == 2 * x
  ).all()
