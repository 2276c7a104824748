"""Measures speed and memory, and compares with PyTorch: `python -m tools.benchmark [all|PART]`.

Every part runs in its own process, so that peak memory and compilations do not mix, on one device,
in float32, with random weights and inputs. A plain matrix product, measured before and after,
scales PyTorch's seconds to this machine. Run it on an idle machine: the results contain the load
average at the start. `all` leaves out `loader`, which needs torch and torchvision, `fusion`, the
paper's efficiency study, `steps`, a train step of every task, `rerank`, a pair of retrieval's
re-ranking, and `ops`, every array operation beside its reference.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import vqa as vqa_config
from mplug_jax import data as data_lib
from mplug_jax.config import Config
from mplug_jax.config.presets import PRESETS
from mplug_jax.data import pipeline
from mplug_jax.data.sources import vqa
from mplug_jax.data.text import tokenizer_base, wordpiece
from mplug_jax.decoding import beam_search
from mplug_jax.flops import traced
from mplug_jax.models.factory import build_model
from mplug_jax.models.mplug import decoding_fns
from mplug_jax.parallel import batches as batches_lib
from mplug_jax.performance import fusion_benchmark, ops_benchmark, train_step_benchmark
from mplug_jax.performance.train_step_benchmark import timed
from mplug_jax.runtime import files, json_text
from mplug_jax.runtime import process as host
from mplug_jax.training import loop
from tools import benchmark_loader, benchmark_report

BATCH = 2
QUESTION_TOKENS = 32
ANSWER_TOKENS = 6
BEAMS = 5
CAPTION_TOKENS = 25


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("part", nargs="?", default="all", choices=["all", *PARTS])
  parser.add_argument("--preset", default="base", choices=sorted(PRESETS))
  parser.add_argument("--image_size", type=int, default=0, help="pixels; 0: the preset's")
  parser.add_argument(
    "--repeats",
    type=int,
    default=5,
    help="number of timed train steps, and of captionings for each batch size",
  )
  parser.add_argument("--caption_batches", type=int, nargs="+", default=[1, 4, 8])
  parser.add_argument(
    "--batch", type=int, default=2, help="batch size of steps, rerank, fusion and ops"
  )
  parser.add_argument(
    "--tasks",
    nargs="+",
    default=list(train_step_benchmark.TASKS),
    choices=train_step_benchmark.TASKS,
    help="of steps",
  )
  parser.add_argument("--text_tokens", type=int, default=30, help="of fusion")
  parser.add_argument("--json", default="", help="file for the results")
  parser.add_argument("--overwrite", action="store_true", help="replace existing files")
  parser.add_argument("--out", default="fusion", help="of fusion: OUT.csv and OUT.png are written")
  options = parser.parse_args(argv)
  figures = (f"{options.out}.csv", f"{options.out}.png")
  try:
    for path in (options.json, *(figures if options.part == "fusion" else ())):
      files.require_new(path, options.overwrite)
  except FileExistsError as error:
    parser.error(str(error))
  return options


def _vocabulary(size: int) -> bytes:
  """Returns a WordPiece vocab.txt of the special tokens and made-up words."""
  return "\n".join(
    [
      *tokenizer_base.SPECIAL_TOKENS,
      *(f"word{i}" for i in range(size - len(tokenizer_base.SPECIAL_TOKENS))),
    ]
  ).encode()


def _config(options: argparse.Namespace) -> Config:
  """Returns the config of configs/vqa.py with the batch of the reference figures."""
  config = vqa_config.get_config(f"{options.preset},res={options.image_size}").unlock()
  config.model.dtype = "float32"
  config.mesh.data = 1
  config.batch_size = BATCH
  config.data.update(
    {
      "questions_per_image": 1,
      "max_question": QUESTION_TOKENS,
      "max_answers": 1,
      "max_answer_tokens": ANSWER_TOKENS,
    }
  )
  return config


def _tokenizer(config: Config) -> wordpiece.WordPieceTokenizer:
  return wordpiece.WordPieceTokenizer(_vocabulary(config.model.vocab_size or 320))


def _processor_seconds() -> np.ndarray:
  """Returns the CPU seconds of this process so far: [in the program, in the system].

  Those in the system are mostly page faults.
  """
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return np.array([usage.ru_utime, usage.ru_stime])


def _peak_memory() -> float:
  """Returns the largest resident set of this process so far, in GiB."""
  unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def matmul(options: argparse.Namespace) -> dict[str, Any]:
  """Measures the best rate of a plain float32 product in GFLOP/s."""
  del options
  rates = train_step_benchmark.product_rates()
  return {"gflop_per_second": max(rates.values()), "rates": rates}


def vqa_step(options: argparse.Namespace) -> dict[str, Any]:
  """Measures the train step of VQA with dropout and the official optimizer groups."""
  config = _config(options)
  config.optim.groups = "official"
  tokenizer = _tokenizer(config)
  built = loop.build(
    config, tokenizer, total_steps=100, steps_per_epoch=100, devices=jax.devices()[:1]
  )
  batch = train_step_benchmark.random_batch(built.task.batch_spec(BATCH), tokenizer.vocab_size)
  with jax.set_mesh(built.mesh):
    init_seconds, state = timed(built.init)
    batch = batches_lib.put_batch(batch, built.mesh)
    healthy = jnp.bool_(True)
    compile_seconds, step = timed(lambda: built.train_step.lower(state, batch, healthy).compile())
    host.release_freed_memory()
    _, (state, _, health) = timed(lambda: step(state, batch, healthy))
    seconds = []
    before = _processor_seconds()
    for _ in range(options.repeats):
      elapsed, (state, _, health) = timed(lambda: step(state, batch, healthy))  # noqa: B023
      seconds.append(elapsed)
  if not health["ok"]:
    raise RuntimeError("The train step's loss or gradients are not finite.")
  user, system = (_processor_seconds() - before) / options.repeats
  gflop = traced.train_step_flops(built.task, BATCH) / 1e9
  median = statistics.median(seconds)
  return {
    "batch": BATCH,
    "seconds": median,
    "min_seconds": min(seconds),
    "user_seconds": user,
    "system_seconds": system,
    "init_seconds": init_seconds,
    "compile_seconds": compile_seconds,
    "gflop": gflop,
    "gflop_per_second": gflop / median,
    "peak_gib": _peak_memory(),
  }


def _random_params(task: Any, rng: np.random.Generator) -> Any:
  """Returns normal parameters of a task with a standard deviation of 0.02."""
  spec = jax.eval_shape(task.init, jax.random.key(0), task.batch_spec(1))
  return jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32)), spec)


def caption(options: argparse.Namespace) -> dict[str, Any]:
  """Measures beam search from pixels in the official mode.

  The end token is masked until the last step, so that every step runs.
  """
  config = _config(options)
  tokenizer = _tokenizer(config)
  task = loop.tasks.get("vqa")(build_model(config, tokenizer), config, tokenizer)
  rng = np.random.default_rng(0)
  params = _random_params(task, rng)

  def generate(params: Any, image: jax.Array) -> Any:
    model = type(task.model)
    memory = task.model.memory(task.with_tokens(params, {"image": image})["image"])
    cache = task.apply(params, model.init_cache, memory, BEAMS, CAPTION_TOKENS + 1)
    prompt = jnp.full((memory.rows, 1), tokenizer.bos_id, jnp.int32)
    return beam_search.beam_search(
      *decoding_fns(task.model, params),
      cache,
      prompt,
      jnp.ones((memory.rows,), jnp.int32),
      beams=BEAMS,
      max_length=CAPTION_TOKENS,
      min_length=CAPTION_TOKENS,
      eos_id=tokenizer.eos_id,
      pad_id=tokenizer.pad_id,
      mode="reference",
    )

  result = {
    "gflop_per_image": traced.function_flops(
      generate,
      params,
      jax.ShapeDtypeStruct((1, task.model.image_size, task.model.image_size, 3), np.uint8),
      steps=CAPTION_TOKENS,
    )
    / 1e9,
    "batches": {},
  }
  for size in options.caption_batches:
    image = rng.integers(0, 256, (size, task.model.image_size, task.model.image_size, 3), np.uint8)
    compile_seconds, run = timed(lambda: jax.jit(generate).lower(params, image).compile())  # noqa: B023
    measured = [timed(lambda: run(params, image)) for _ in range(options.repeats + 1)]  # noqa: B023
    if not (measured[0][1].lengths == 1 + CAPTION_TOKENS).all():
      raise RuntimeError("The captions are shorter than the benchmark's.")
    seconds = statistics.median(elapsed for elapsed, _ in measured[1:]) / size
    result["batches"][str(size)] = {
      "seconds_per_image": seconds,
      "images_per_second": 1 / seconds,
      "compile_seconds": compile_seconds,
      "gflop_per_second": result["gflop_per_image"] / seconds,
      "peak_gib": _peak_memory(),
    }
  return result


def startup(options: argparse.Namespace) -> dict[str, float]:
  """Measures the seconds from the command to the end of the first train step.

  "cold" starts with an empty compilation cache, "warm" with the cache of the first run.
  """
  config = _config(options)
  with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, "vocab.txt"), "wb") as file:
      file.write(_vocabulary(config.model.vocab_size or 320))
    values = {
      "compilation_cache": f"{folder}/cache",
      "tokenizer.kind": "wordpiece",
      "tokenizer.path": f"{folder}/vocab.txt",
      "model.dtype": "float32",
      "batch_size": BATCH,
      "total_steps": 100,
      "mesh.data": 1,
      **{
        f"data.{name}": config.data[name]
        for name in ("questions_per_image", "max_question", "max_answers")
      },
    }
    command = [
      sys.executable,
      "-m",
      "mplug_jax.main",
      f"--config=configs/vqa.py:{options.preset},res={options.image_size}",
      *(f"--config.{name}={value}" for name, value in values.items()),
    ]
    return {
      name: _seconds_until(command + [f"--workdir={folder}/{name}"], "first step done")
      for name in ("cold", "warm")
    }


def _seconds_until(command: Sequence[str], sign: str) -> float:
  """Starts a command, waits for a line that contains `sign`, kills it and returns the seconds."""
  start = time.perf_counter()
  last = ""
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  ) as process:
    assert process.stdout is not None
    for line in process.stdout:
      if sign in line:
        seconds = time.perf_counter() - start
        process.kill()
        return seconds
      last = line.strip() or last
  raise RuntimeError(f"{' '.join(command)} ended before its first step: {last}")


def data(options: argparse.Namespace) -> dict[str, Any]:
  """Measures rows per second of the training pipeline of configs/vqa.py, for any --preset.

  A row is an image with its questions.
  """
  config = vqa_config.get_config("small")
  source = vqa.get(config.data, "train")
  batches = pipeline.train_batches(
    source,
    data_lib.make_transform(config, _tokenizer(config), train=True),
    batch_size=config.batch_size,
    seed=0,
    workers=config.loader.workers,
    threads=config.loader.threads,
  )
  for _ in range(20):  # the first rows fill the caches
    next(batches)
  count = 100 * options.repeats
  start = time.perf_counter()
  for _ in range(count):
    next(batches)
  rows = count * config.batch_size / (time.perf_counter() - start)
  batches.close()
  return {
    "rows_per_second": rows,
    "questions_per_row": config.data.questions_per_image,
    "image_size": config.model.image_size,
  }


def fusion(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Runs fusion_benchmark.measure and writes a CSV file and a figure."""
  model = build_model(_config(options), _tokenizer(_config(options)))
  rows = fusion_benchmark.measure(model, options.batch, options.text_tokens, options.repeats)
  print(f"written: {', '.join(fusion_benchmark.write(rows, options.out))}", file=sys.stderr)
  return rows


def steps(options: argparse.Namespace) -> Any:
  """Runs train_step_benchmark.steps."""
  return train_step_benchmark.steps(
    options.tasks, options.preset, options.image_size, options.batch, options.repeats
  )


def rerank(options: argparse.Namespace) -> Any:
  """Runs train_step_benchmark.rerank."""
  return train_step_benchmark.rerank(
    options.preset, options.image_size, options.batch, options.repeats
  )


def ops(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Runs ops_benchmark.measure."""
  return ops_benchmark.measure(options.batch, options.repeats)


PARTS = {
  "vqa_step": vqa_step,
  "caption": caption,
  "startup": startup,
  "data": data,
  "loader": benchmark_loader.loader,
  "fusion": fusion,
  "steps": steps,
  "rerank": rerank,
  "ops": ops,
}
_ALONE = ("loader", "fusion", "steps", "rerank", "ops")  # not run by "all"


def _in_process(function: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> Any:
  """Returns function(options), called in a new process that is set up like a run."""
  with ProcessPoolExecutor(
    1, mp_context=multiprocessing.get_context("spawn"), initializer=host.prepare
  ) as pool:
    return pool.submit(function, options).result()


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  options = _parse(argv)
  results = {
    "preset": options.preset,
    "image_size": options.image_size or PRESETS[options.preset]["image_size"],
  }
  results["load_average"] = os.getloadavg()[0]
  before = _in_process(matmul, options)
  names = [options.part]
  if options.part == "all":
    names = [name for name in PARTS if name not in _ALONE]
  for name in names:
    print(f"measuring {name} ...", file=sys.stderr, flush=True)
    results[name] = _in_process(PARTS[name], options)
  results["matmul"] = max(before, _in_process(matmul, options), key=lambda x: x["gflop_per_second"])
  results["compared"] = benchmark_report.compare(results)
  print("\n".join(benchmark_report.report(results)))
  if options.json:
    with open(options.json, "w") as file:
      file.write(json_text.dumps(results, indent=2))


if __name__ == "__main__":
  main()
