"""How near the machine's plain matrix product every task's train step comes, and what re-ranking a pair costs.

On one device, in float32, with random weights and inputs. The rate of a plain product is measured
in the same process, before and after, so that the share means something on a machine that does
other things as well.
"""

import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mplug_jax import config as config_lib
from mplug_jax.data.text.stand_in_tokenizer import StandInTokenizer
from mplug_jax.flops import layers, traced
from mplug_jax.parallel import batches
from mplug_jax.training.build import build

TASKS = ("vqa", "caption", "retrieval", "grounding", "nlvr2", "snli_ve", "pretrain")
_CONFIGS = os.path.join(os.path.dirname(__file__), "..", "..", "configs")
_PRODUCTS = ((2048, 2048, 2048), (1024, 768, 3072), (1154, 768, 3072))  # m, k, n


def timed(function):
  """(seconds until the result is computed, result)."""
  start = time.perf_counter()
  result = jax.block_until_ready(function())
  return time.perf_counter() - start, result


def product_rates():
  """{"m x k x n": best rate of a plain float32 product, GFLOP/s}."""
  product, rates = jax.jit(jnp.matmul), {}
  for m, k, n in _PRODUCTS:
    a, b = jnp.full((m, k), 0.5), jnp.full((k, n), 0.25)
    jax.block_until_ready(product(a, b))
    rates[f"{m} x {k} x {n}"] = (
      layers.linear(m, k, n)
      / min(timed(lambda a=a, b=b: product(a, b))[0] for _ in range(10))
      / 1e9
    )
  return rates


def random_batch(spec, vocabulary):
  """Arrays of a `Task.batch_spec`: ids that are no special tokens, pixels, weights of 1, first labels, no corrupt image."""
  rng, batch = np.random.default_rng(0), {}
  for name, x in spec.items():
    if x.dtype == jnp.int32 and "label" not in name:
      batch[name] = rng.integers(5, vocabulary, x.shape, np.int32)
    elif x.dtype == jnp.uint8:
      batch[name] = rng.integers(0, 256, x.shape, np.uint8)
    else:
      batch[name] = np.full(x.shape, name != "corrupt" and "label" not in name, x.dtype)
  return batch


def _config(task, preset, image_size, batch):
  """The task's config with the preset's images, which are larger than scenes.

  Without rematerialisation, for what it computes again is no
  work of the model.
  """
  image_size = image_size or config_lib.PRESETS[preset]["image_size"]
  config = config_lib.load(os.path.join(_CONFIGS, f"{task}.py:{preset},res={image_size}")).unlock()
  config.update({"batch_size": batch})
  config.model.update({"dtype": "float32", "remat": "none"})
  config.mesh.data, config.eval.batch_size, config.optim.microbatches = 1, batch, 1
  return config


def _build(config):
  tokenizer = StandInTokenizer(config.model.vocab_size or config.tokenizer.vocab_size)
  return build(
    config, tokenizer, total_steps=100, steps_per_epoch=100, devices=jax.devices()[:1]
  ), tokenizer


def step(task, preset, image_size, batch, repeats):
  """One task -> {"batch", "seconds" (median), "gflop", "gflop_per_second", "product" (GFLOP/s of the plain one), "share", "peak_gib" (what
  the compiled step needs)}.
  """
  built, tokenizer = _build(_config(task, preset, image_size, batch))
  rows = random_batch(built.task.batch_spec(batch), tokenizer.vocab_size)
  rates = [max(product_rates().values())]
  with jax.set_mesh(built.mesh):
    state, rows, healthy = built.init(), batches.put_batch(rows, built.mesh), jnp.bool_(True)
    compiled = built.train_step.lower(state, rows, healthy).compile()
    seconds = []
    for _ in range(repeats + 1):
      elapsed, (state, _, health) = timed(lambda: compiled(state, rows, healthy))  # noqa: B023
      seconds.append(elapsed)
  if not health["ok"]:
    raise RuntimeError(f"The loss or gradients of {task} are not finite.")
  rates.append(max(product_rates().values()))
  memory, gflop, median = (
    compiled.memory_analysis(),
    traced.train_step_flops(built.task, batch) / 1e9,
    statistics.median(seconds[1:]),
  )
  return {
    "batch": batch,
    "seconds": median,
    "gflop": gflop,
    "gflop_per_second": gflop / median,
    "product": max(rates),
    "share": gflop / median / max(rates),
    "peak_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
  }


def steps(tasks, preset, image_size, batch, repeats):
  """{task: see `step`}."""
  return {task: step(task, preset, image_size, batch, repeats) for task in tasks}


def steps_table(results):
  """Lines of text."""
  lines = [
    f"{'train step':12}{'batch':>6}{'GFLOP':>8}{'seconds':>9}{'GFLOP/s':>9}{'plain':>7}{'share':>7}{'peak GiB':>10}"
  ]
  return lines + [
    f"{task:12}{x['batch']:6}{x['gflop']:8.0f}{x['seconds']:9.2f}{x['gflop_per_second']:9.0f}{x['product']:7.0f}"
    f"{x['share']:7.0%}{x['peak_gib']:10.2f}"
    for task, x in results.items()
  ]


def rerank(preset, image_size, images, repeats):
  """A pair of an image and a text in re-ranking: with the image's keys and values computed once, as the evaluator does, and with all of the
  fusion network computed for every pair.

  Returns:
    {"kept", "again": seconds of a pair (medians of turns), "ratio": again / kept, "memory": seconds
    for what is kept of an image, its encoder included, "texts": scored with an image at a time}.
  """
  config = _config("retrieval", preset, image_size, images)
  built, tokenizer = _build(config)
  model, texts = built.task.model, config.task.rerank_texts
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), built.abstract.params
  )
  rows = random_batch(built.task.batch_spec(images), tokenizer.vocab_size)
  functions = {name: jax.jit(fn) for name, fn in built.task.predict_fns().items()}

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
    rng.standard_normal((images, layers.image_tokens(model), model.hidden_size), np.float32)
  )
  again = jax.jit(again)
  calls = {
    "kept": (lambda: functions["rerank"](params, pairs), images * texts),
    "again": (lambda: again(params, image, bank["tokens"], bank["text_mask"]), images),
  }
  seconds = {name: [] for name in calls}
  for _ in range(repeats + 1):
    for name, (call, count) in calls.items():
      seconds[name].append(timed(call)[0] / count)
  kept, anew = (statistics.median(seconds[name][1:]) for name in ("kept", "again"))
  return {
    "kept": kept,
    "again": anew,
    "ratio": anew / kept,
    "memory": memory_seconds / images,
    "texts": texts,
  }


def rerank_table(x):
  """Lines of text."""
  return [
    f"re-ranking, {x['texts']} texts an image at a time: {x['kept']:.4f} s a pair with the "
    f"image's keys and values kept, "
    f"{x['again']:.4f} s with all computed again: {x['ratio']:.2f} x; of an image: "
    f"{x['memory']:.2f} s, encoder included"
  ]
