"""Rates of train steps relative to a plain matrix product, and the cost of re-ranking a pair.

On one device, in float32, with random weights and inputs. The rate of a plain product is measured
in the same process before and after, so that the share is meaningful on a machine with other load.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import config as config_lib
from mplug_jax.config import Config
from mplug_jax.config.presets import PRESETS
from mplug_jax.data.text.stand_in_tokenizer import StandInTokenizer
from mplug_jax.flops import traced
from mplug_jax.parallel import batches
from mplug_jax.performance.geometry import image_tokens
from mplug_jax.training.build import Build, build

TASKS = ("vqa", "caption", "retrieval", "grounding", "nlvr2", "snli_ve", "pretrain")
_CONFIGS = os.path.join(os.path.dirname(__file__), "..", "..", "configs")
_PRODUCTS = ((2048, 2048, 2048), (1024, 768, 3072), (1154, 768, 3072))  # m, k, n


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
  """Returns the seconds until the result of a function is computed, and the result.

  Args:
    function: function without arguments.
  """
  start = time.perf_counter()
  result = jax.block_until_ready(function())
  return time.perf_counter() - start, result


def product_rates() -> dict[str, float]:
  """Returns {"m x k x n": best rate of a plain float32 product in GFLOP/s}."""
  product = jax.jit(jnp.matmul)
  rates = {}
  for m, k, n in _PRODUCTS:
    a = jnp.full((m, k), 0.5)
    b = jnp.full((k, n), 0.25)
    jax.block_until_ready(product(a, b))
    seconds = min(timed(lambda a=a, b=b: product(a, b))[0] for _ in range(10))
    rates[f"{m} x {k} x {n}"] = 2 * m * k * n / seconds / 1e9
  return rates


def random_batch(
  spec: Mapping[str, jax.ShapeDtypeStruct], vocabulary: int
) -> dict[str, np.ndarray]:
  """Makes a batch: random ids and pixels, weights of 1, first labels, no corrupt image.

  Args:
    spec: result of Task.batch_spec.
    vocabulary: number of tokens; the first five, special ones, are not drawn.
  """
  rng = np.random.default_rng(0)
  batch = {}
  for name, x in spec.items():
    if x.dtype == jnp.int32 and "label" not in name:
      batch[name] = rng.integers(5, vocabulary, x.shape, np.int32)
    elif x.dtype == jnp.uint8:
      batch[name] = rng.integers(0, 256, x.shape, np.uint8)
    else:
      batch[name] = np.full(x.shape, name != "corrupt" and "label" not in name, x.dtype)
  return batch


def _config(task: str, preset: str, image_size: int, batch: int) -> Config:
  """Returns the task's config with images of the preset's size, which are larger than scenes.

  Without rematerialization, because recomputation is no work of the model.
  """
  image_size = image_size or PRESETS[preset]["image_size"]
  config = config_lib.load(os.path.join(_CONFIGS, f"{task}.py:{preset},res={image_size}")).unlock()
  config.update({"batch_size": batch})
  config.model.update({"dtype": "float32", "remat": "none"})
  config.mesh.data, config.eval.batch_size, config.optim.microbatches = 1, batch, 1
  return config


def _build(config: Config) -> tuple[Build, StandInTokenizer]:
  """Builds a run on one device, with a stand-in tokenizer."""
  tokenizer = StandInTokenizer(config.model.vocab_size or config.tokenizer.vocab_size)
  device = jax.devices()[:1]
  return build(config, tokenizer, total_steps=100, steps_per_epoch=100, devices=device), tokenizer


def step(task: str, preset: str, image_size: int, batch: int, repeats: int) -> dict[str, float]:
  """Measures the train step of a task.

  Args:
    task: name of a config file.
    preset: name of a model size.
    image_size: pixels of a side; 0 for the preset's.
    batch: rows of a batch.
    repeats: measured steps.

  Returns:
    {"batch", "seconds" (median), "gflop", "gflop_per_second", "product" (GFLOP/s of a plain
    product), "share" (of that rate), "peak_gib" (memory of the compiled step)}.
  """
  built, tokenizer = _build(_config(task, preset, image_size, batch))
  rows = random_batch(built.task.batch_spec(batch), tokenizer.vocab_size)
  rates = [max(product_rates().values())]
  with jax.set_mesh(built.mesh):
    state = built.init()
    rows = batches.put_batch(rows, built.mesh)
    healthy = jnp.bool_(True)
    compiled = built.train_step.lower(state, rows, healthy).compile()
    seconds = []
    for _ in range(repeats + 1):
      elapsed, (state, _, health) = timed(lambda: compiled(state, rows, healthy))  # noqa: B023
      seconds.append(elapsed)
  if not health["ok"]:
    raise RuntimeError(f"The loss or gradients of {task} are not finite.")
  rates.append(max(product_rates().values()))
  memory = compiled.memory_analysis()
  assert memory is not None
  gflop = traced.train_step_flops(built.task, batch) / 1e9
  median = statistics.median(seconds[1:])
  return {
    "batch": batch,
    "seconds": median,
    "gflop": gflop,
    "gflop_per_second": gflop / median,
    "product": max(rates),
    "share": gflop / median / max(rates),
    "peak_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
  }


def steps(
  tasks: Iterable[str], preset: str, image_size: int, batch: int, repeats: int
) -> dict[str, dict[str, float]]:
  """Returns {task: result of `step`}.

  Args:
    tasks: names of config files.
    preset: name of a model size.
    image_size: pixels of a side; 0 for the preset's.
    batch: rows of a batch.
    repeats: measured steps.
  """
  return {task: step(task, preset, image_size, batch, repeats) for task in tasks}


def steps_table(results: Mapping[str, Mapping[str, float]]) -> list[str]:
  """Formats results of `steps` as lines of text.

  Args:
    results: {task: result of `step`}.
  """
  lines = [
    f"{'train step':12}{'batch':>6}{'GFLOP':>8}{'seconds':>9}{'GFLOP/s':>9}{'plain':>7}{'share':>7}"
    f"{'peak GiB':>10}"
  ]
  return lines + [
    f"{task:12}{x['batch']:6}{x['gflop']:8.0f}{x['seconds']:9.2f}{x['gflop_per_second']:9.0f}"
    f"{x['product']:7.0f}{x['share']:7.0%}{x['peak_gib']:10.2f}"
    for task, x in results.items()
  ]


def rerank(preset: str, image_size: int, images: int, repeats: int) -> dict[str, float]:
  """Measures the re-ranking of a pair of an image and a text.

  The keys and values of an image are either computed once, as the evaluator does, or the whole
  fusion network is computed for every pair.

  Args:
    preset: name of a model size.
    image_size: pixels of a side; 0 for the preset's.
    images: images of a batch.
    repeats: measured runs.

  Returns:
    {"kept", "again": median seconds of a pair, "ratio": again / kept, "memory": seconds to encode
    an image and compute its keys and values, "texts": number of texts scored at once per image}.
  """
  config = _config("retrieval", preset, image_size, images)
  built, tokenizer = _build(config)
  model = built.task.model
  texts = config.task.rerank_texts
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), built.abstract.params
  )
  rows = random_batch(built.task.batch_spec(images), tokenizer.vocab_size)
  functions = {name: jax.jit(fn) for name, fn in built.task.predict_fns().items()}

  @jax.jit
  def again(params, image, tokens, mask):
    def score(module, image, tokens, mask):
      return module.match_logits(module.fuse(tokens, mask, image)[1])

    return built.task.apply(params, score, image, tokens, mask)

  bank = functions["embed_texts"](params, {"caption": rows["caption"]})
  functions["image_memory"](params, rows)
  memory_seconds, memory = timed(lambda: functions["image_memory"](params, rows))
  pairs = {
    "memory": memory,
    "texts": bank,
    "pair_text": rng.integers(0, images, (images, texts), np.int32),
  }
  image = jnp.asarray(
    rng.standard_normal((images, image_tokens(model), model.hidden_size), np.float32)
  )
  calls = {
    "kept": (lambda: functions["rerank"](params, pairs), images * texts),
    "again": (lambda: again(params, image, bank["tokens"], bank["text_mask"]), images),
  }
  seconds = {name: [] for name in calls}
  for _ in range(repeats + 1):
    for name, (call, count) in calls.items():
      seconds[name].append(timed(call)[0] / count)
  medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
  return medians | {
    "ratio": medians["again"] / medians["kept"],
    "memory": memory_seconds / images,
    "texts": texts,
  }


def rerank_table(result: Mapping[str, float]) -> list[str]:
  """Formats the result of `rerank` as lines of text.

  Args:
    result: see `rerank`.
  """
  return [
    f"re-ranking, {result['texts']} texts an image at a time: {result['kept']:.4f} s a pair with "
    f"the image's keys and values kept, {result['again']:.4f} s with all computed again: "
    f"{result['ratio']:.2f} x; of an image: {result['memory']:.2f} s, encoder included"
  ]
