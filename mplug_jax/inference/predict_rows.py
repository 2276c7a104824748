"""Batches of rows through a Predictor for the predict command; continues an interrupted output."""

import itertools
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mplug_jax.data.errors import NAMED, ImageError
from mplug_jax.inference import methods, predict_job, result_file
from mplug_jax.inference.predict_job import Job
from mplug_jax.inference.row_reader import Reader
from mplug_jax.runtime import json_text

_NOT_FINITE = (
  "The score is not finite: the weights are damaged, or numbers overflow in config.model.dtype."
)
_MAP = re.compile(r"\d{6,}\.png")  # attention maps, see explain.save_rows

Row = dict[str, Any]
Inputs = tuple[Sequence, Sequence, dict[int, str]]  # images, texts, {row number: error}


def run(options: Namespace) -> int:
  """Runs the predict command.

  Args:
    options: of the command line.

  Returns:
    The exit status.

  Raises:
    ValueError, OSError, CheckpointError: nothing can be computed; one sentence.
  """
  job = predict_job.of_options(options)
  output = result_file.ResultFile(options.output, job.description) if options.output else None
  if output:
    _check_output(output, job)
  done = output.done if output else 0
  failed = output.failed if output else 0
  if done < job.total:
    if options.explain and not done:
      _check_folder(options.explain)
    from mplug_jax.inference.predictor import Predictor
    from mplug_jax.runtime.process import tune_process

    tune_process()
    predictor = Predictor.load(
      options.checkpoint, options.config, options.tokenizer, batch_size=options.batch_size
    )
    predictor.task(
      job.method
    )  # raises if the checkpoint does not support it, before reading images
    failed += _predict(predictor, job, options, output, done)
  return int(options.strict and failed > 0)


def _check_output(output: result_file.ResultFile, job: Job) -> None:
  """Raises ValueError unless the output is empty or has the first results of the job."""
  names = dict(job.names)
  error = names.pop("error")
  others = {names.pop("explained"), job.command.text}
  results = set(names.values()) if job.is_known else None
  output.check(job.rows(), job.total, results, error, others)
  if output.done:
    print(
      f"{output.path} has {output.done} of {job.total} rows; continuing after them."
      if output.done < job.total
      else f"{output.path} has all {job.total} rows of this job; nothing is left to do.",
      file=sys.stderr,
    )


def _check_folder(folder: str) -> None:
  """Raises ValueError if the folder of --explain has attention maps of another job."""
  if os.path.isdir(folder) and any(map(_MAP.fullmatch, os.listdir(folder))):
    raise ValueError(
      f"--explain={folder} has attention maps of another job; choose another folder, or remove "
      "them."
    )


def _predict(
  predictor: Any,
  job: Job,
  options: Namespace,
  output: result_file.ResultFile | None,
  done: int,
) -> int:
  """Writes the lines of all rows but the first `done`; returns the number of failed rows."""
  from mplug_jax.reporting import progress as progress_lib

  read = _reader(predictor, job.method, options)
  explain = _explaining(predictor, job, options)
  progress = progress_lib.Progress(job.total, enabled=job.total > 1, stream=sys.stderr)
  failed = 0
  listed: list[str] = []
  with ThreadPoolExecutor(1) as pool:
    batches = _batches(itertools.islice(job.rows(), done, None), predictor.batch_size)
    batch = next(batches, None)
    assert batch, "there are rows without a result"
    reading = pool.submit(read, batch)
    while batch:
      following = next(batches, None)
      read_batch = reading.result()
      if following:
        reading = pool.submit(read, following)
      lines, errors = _lines(predictor, job, options, batch, read_batch)
      explain(lines, read_batch, done)
      _write(lines, output)
      failed += len(errors)
      done += len(batch)
      listed += errors[: NAMED - len(listed)]
      progress.update(done)
      batch = following
  progress.pause()
  if output:
    output.close()
  if failed:
    more = ["..."] if failed > len(listed) else []
    print(
      f"{failed} of {job.total} rows have no result:", *listed, *more, sep="\n  ", file=sys.stderr
    )
  return failed


def _reader(predictor: Any, method: str, options: Namespace) -> Reader:
  """Returns the Reader of a method's rows."""
  row = methods.METHODS[method]
  assert row.command is not None
  check = None
  if row.command.text:
    check = _text_check(predictor.text_rows(method), options.truncate)
  full_size = row.canvas or options.explain
  return Reader(row.command, options, check, 0 if full_size else predictor.config.model.image_size)


def _text_check(rows: Callable, truncate: bool) -> Callable[[Any], Any]:
  return lambda text: rows([text], truncate)


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
  while batch := list(itertools.islice(rows, size)):
    yield batch


def _write(lines: Sequence[Row], output: result_file.ResultFile | None) -> None:
  if output:
    output.write(lines)
  else:
    print("".join(map(result_file.to_line, lines)), end="", flush=True)


def _lines(
  predictor: Any, job: Job, options: Namespace, rows: Sequence[Row], batch: Inputs
) -> tuple[list[Row], list[str]]:
  """Returns the output lines of a batch, and the errors of rows without a result."""
  images, texts, errors = batch
  good = [number for number in range(len(rows)) if number not in errors]
  results = []
  if good:
    try:
      results = _call(predictor, job, [images[i] for i in good], [texts[i] for i in good], options)
    except ImageError as error:  # of a video, which is decoded by the call
      if len(good) == 1:
        batch = (images, texts, errors | {good[0]: str(error)})
        return _lines(predictor, job, options, rows, batch)
      return _halves(predictor, job, options, rows, batch)
  by_row = dict(zip(good, results))
  errors = errors | {i: _NOT_FINITE for i, result in by_row.items() if not _is_finite(result)}
  lines = []
  for i, row in enumerate(rows):
    text = job.command.text
    used = {text: texts[i]} if texts[i] and text not in row else {}
    result = {"error": errors[i]} if i in errors else by_row[i]
    lines.append(row | used | {job.name(key): value for key, value in result.items()})
  return lines, [errors[i] for i in sorted(errors)]


def _is_finite(result: Row) -> bool:
  """Returns whether all numbers of a result are finite, and --n has a caption with such a score."""
  return result == json_text.without_nonfinite(result) and [] not in result.values()


def _halves(
  predictor: Any, job: Job, options: Namespace, rows: Sequence[Row], batch: Inputs
) -> tuple[list[Row], list[str]]:
  """Returns `_lines` of both halves of a batch, to isolate a video that cannot be read."""
  images, texts, errors = batch
  lines: list[Row] = []
  failed: list[str] = []
  middle = len(rows) // 2
  for start, stop in ((0, middle), (middle, len(rows))):
    half_errors = {n - start: error for n, error in errors.items() if start <= n < stop}
    half = (images[start:stop], texts[start:stop], half_errors)
    half_lines, half_failed = _lines(predictor, job, options, rows[start:stop], half)
    lines += half_lines
    failed += half_failed
  return lines, failed


def _call(
  predictor: Any, job: Job, images: Sequence, texts: Sequence, options: Namespace
) -> list[Row]:
  """Calls a method of the Predictor; returns one dictionary a row."""
  if job.command.results:
    return job.command.results(predictor, images, texts, options)
  results = getattr(predictor, job.method)(images, texts, truncate=options.truncate)
  return [result._asdict() for result in results]


def _explaining(predictor: Any, job: Job, options: Namespace) -> Callable:
  """Returns the function of --explain, which writes the maps and adds their paths to the lines.

  Its arguments are the lines, the result of a Reader, and the number of the first row.
  """
  if not options.explain:
    return lambda lines, batch, first: None
  row = methods.METHODS[job.method]
  if not row.explained:
    raise ValueError(f"--explain has no maps for --task={options.task}.")
  from mplug_jax.inference import explain

  explainer = explain.Explainer(predictor)
  arguments = {"truncate": options.truncate} if row.text else {"prompt": options.prompt}

  def write(lines: Sequence[Row], batch: Inputs, first: int) -> None:
    pairs = [
      None if job.names["error"] in line or isinstance(text, list) else (image, text)
      for line, image, text in zip(lines, *batch[:2])
    ]
    paths = explain.save_rows(explainer, job.method, pairs, options.explain, first, **arguments)
    for line, path in zip(lines, paths):
      if path:
        line[job.names["explained"]] = path

  return write
