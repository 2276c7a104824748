"""Train steps and generation of every task are lowered for GPUs, with kernels of attention."""

import importlib

import jax
import pytest

from mplug_jax.performance.tpu import compile as compiler

PROGRAMS = [
  ("pretrain", "train"),
  ("vqa", "train"),
  ("vqa", "generate"),
  ("caption", "train"),
  ("caption", "generate"),
  ("caption_scst", "train"),
  ("retrieval", "train"),
  ("grounding", "train"),
  ("grounding", "generate"),
  ("nlvr2", "train"),
  ("snli_ve", "train"),
]


@pytest.mark.parametrize(("name", "function"), PROGRAMS)
def test_program_for_cuda_contains_the_attention_kernels(name, function):
  c = importlib.import_module(f"configs.{name}").get_config("tiny").unlock()
  c.batch_size = c.eval.batch_size = 8
  c.model.dtype = "bfloat16"
  built = compiler.build_for(c.lock(), jax.devices()[:1])
  with jax.set_mesh(built.mesh):
    text = compiler.trace(built, c, function).lower(lowering_platforms=("cuda",)).as_text()
  kernels = {kernel for kernel in ("forward", "keys", "query") if f"attention_{kernel}_" in text}
  assert text.count("__gpu$xla.gpu.triton") >= len(kernels) > 0
  assert kernels == ({"forward", "keys", "query"} if function == "train" else {"forward"})
