"""Every parameter has a sharding rule, and no device gathers all image tokens of a batch."""

import re

import jax
import numpy as np
import pytest

from mplug_jax import config as config_lib
from mplug_jax import tasks
from mplug_jax.data.text.stand_in_tokenizer import StandInTokenizer
from mplug_jax.flops import traced
from mplug_jax.models.factory import build_model
from mplug_jax.parallel import batches, rules
from mplug_jax.parallel import mesh as mesh_lib
from mplug_jax.performance.geometry import image_tokens
from mplug_jax.training import loop
from tests.support import tiny_run

TASKS = (
  "pretrain",
  "vqa",
  "caption",
  "caption_scst",
  "retrieval",
  "grounding",
  "nlvr2",
  "snli_ve",
  "video_retrieval",
)


def config_of(task, arg):
  return config_lib.load(str(tiny_run.ROOT / "configs" / f"{task}.py") + f":{arg}").unlock()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
  "size", ["tiny", *(pytest.param(s, marks=pytest.mark.slow) for s in ("base", "large", "huge"))]
)
def test_every_parameter_has_a_sharding_rule(task, size, caplog, monkeypatch):
  """The tiny model has every kind of parameter.

  Its vision and text widths differ, and some of its fusion layers are connected. At the published
  sizes every dimension also divides over fsdp 4 and tensor 2.
  """
  monkeypatch.setattr(rules, "_warnings", set())
  c = config_of(
    task, size if size == "tiny" else f"{size},res=336" + ",init=x" * (task == "caption_scst")
  )
  tokenizer = StandInTokenizer(c.model.vocab_size or 500)
  mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
  if size != "tiny":
    mesh = mesh_lib.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
  params = traced.abstract_parameters(
    tasks.get(c.task.name)(build_model(c, tokenizer), c, tokenizer)
  )
  for path, leaf in jax.tree.leaves_with_path(params):
    rules.parameter_spec(rules.path_name(path), leaf.shape, mesh)
  assert [r.getMessage() for r in caplog.records if "No sharding rule" in r.getMessage()] == []
  if size != "tiny":
    assert not caplog.records


def largest_gathered(compiled, image_tokens):
  """Returns (elements of the largest all-gather with an axis of image tokens, all-gathers)."""
  gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
  shapes = [tuple(map(int, dims.split(","))) for dims in gathered if dims]
  sizes = [int(np.prod(shape)) for shape in shapes if image_tokens in shape]
  return max(sizes, default=0), len(gathered)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "rerank"])
def test_matching_gathers_no_image_tokens(name):
  """Hard negatives inside groups of 2 rows, on a mesh of 8 devices with 2 rows each.

  Re-ranking beside them.
  """
  c = config_of("retrieval", "tiny")
  c.update_from_flattened_dict(
    {
      "batch_size": 16,
      "eval.batch_size": 16,
      "model.image_size": 112,
      "mesh.data": 4,
      "mesh.fsdp": 2,
      "task.negatives.group": 2,
    }
  )
  tokenizer = StandInTokenizer(500)
  built = loop.build(c, tokenizer, 10, 10)
  rows, whole = batches.batch_sharding(built.mesh), rules.replicated(built.mesh)

  def placed(tree, how):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how), tree)

  with jax.set_mesh(built.mesh):
    if name == "train":
      healthy = jax.ShapeDtypeStruct((), bool, sharding=whole)
      lowered = built.train_step.lower(
        built.abstract, placed(built.task.batch_spec(16), rows), healthy
      )
    else:
      sample = built.task.predict_sample("rerank", built.abstract.params, built.task.batch_spec(16))
      sample = {
        key: placed(value, whole if key == "texts" else rows) for key, value in sample.items()
      }
      sample["pair_text"] = jax.ShapeDtypeStruct((16, 4), np.int32, sharding=rows)
      lowered = jax.jit(built.task.predict_fns()["rerank"]).lower(built.abstract.params, sample)
    largest, count = largest_gathered(lowered.compile(), image_tokens(built.task.model))
  assert count > 0 or name == "rerank"  # fsdp gathers parameters
  assert largest < 16 * image_tokens(built.task.model) * c.model.hidden_size
