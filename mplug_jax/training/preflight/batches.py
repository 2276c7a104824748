"""Checks of the data: annotations and images of the splits, and the speed of the input pipeline."""

import contextlib
import time
from typing import Any

import numpy as np

from mplug_jax import data
from mplug_jax.config import Config
from mplug_jax.data import check, pipeline
from mplug_jax.data.check import report as report_lib
from mplug_jax.training.preflight.findings import Findings

_SECONDS = 5.0  # time limit for reading batches after the first
_BATCHES = 20  # number of batches read after the first, at most
_SKIPPED_LINES = ("warning: ", "error: ", "  words")


def check_splits(findings: Findings, config: Config, tokenizer: Any, records: int) -> None:
  """Reports the data check of the training split and of the evaluated split.

  Args:
    findings: receives the results.
    config: of the run.
    tokenizer: of the run.
    records: number of records of each split that are read, evenly spaced; 0: all.
  """
  for split in dict.fromkeys(("train", config.eval.split)):
    with findings.catch():
      report = check.check(config, split, tokenizer, limit=records)
      lines = report_lib.lines(report)
      findings.add(split, *(line for line in lines if not line.startswith(_SKIPPED_LINES)))
      for message in report.warnings:
        findings.warn(f"{split}: {message}")
      for message in report.errors:
        findings.error(f"{split}: {message}")


def check_batches(
  findings: Findings, config: Config, tokenizer: Any, source: Any
) -> tuple[dict[str, np.ndarray], float]:
  """Reads training batches for a few seconds.

  Returns:
    (the first batch, seconds for each further batch).
  """
  batches = pipeline.train_batches(
    source,
    data.make_transform(config, tokenizer, train=True),
    batch_size=config.batch_size,
    seed=config.seed,
    workers=config.loader.workers,
    threads=config.loader.threads,
    block=config.data.shuffle_block,
  )
  with contextlib.closing(batches):
    start = time.perf_counter()
    first = next(batches)
    begin = time.perf_counter()
    count = 0
    while time.perf_counter() - begin < _SECONDS and count < _BATCHES:
      next(batches)
      count += 1
    seconds = (time.perf_counter() - begin) / count
  if config.loader.workers:
    readers = f"{config.loader.workers} processes"
  else:
    readers = f"{config.loader.threads} threads"
  findings.add(
    "batch",
    ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in first.items() if x.ndim > 1),
    f"the first took {begin - start:.2f} s, others {seconds:.3f} s each: "
    f"{config.batch_size / seconds:,.0f} examples a second with {readers}",
  )
  corrupt = int(first["corrupt"].sum()) if "corrupt" in first else 0
  if corrupt:
    findings.warn(f"{corrupt} of {config.batch_size} images of the first batch cannot be read.")
  return first, seconds
