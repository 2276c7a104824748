"""Batches of rows through a Predictor for the predict command; continues an interrupted output."""

import itertools
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mplug_jax.data.errors import ImageError
from mplug_jax.inference import jsonl, methods
from mplug_jax.inference.row_reader import Reader

_LISTED_ERRORS = 10  # errors printed at the end

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
  method = methods.commands()[options.task]
  rows = _rows(options, method)
  total = sum(1 for _ in rows())  # also reads every line once, before anything is computed
  output = jsonl.Results(options.output) if options.output else None
  remaining = rows()
  done = _skip_done(output, remaining, total) if output else 0
  if done == total:
    return 0
  from mplug_jax.inference.predictor import Predictor
  from mplug_jax.runtime.process import tune_process

  tune_process()
  predictor = Predictor.load(
    options.checkpoint, options.config, options.tokenizer, batch_size=options.batch_size
  )
  predictor.task(method)  # raises if the checkpoint does not support it, before images are read
  failed = _predict(predictor, method, options, remaining, output, done, total)
  return int(options.strict and failed > 0)


def _rows(options: Namespace, method: str) -> Callable[[], Iterator[Row]]:
  """Returns a function that iterates over the rows from the start. Raises ValueError."""
  command = methods.METHODS[method].command
  assert command is not None
  sources = [bool(options.image), bool(options.images), bool(options.input)]
  text_alone = command.either and bool(options.text)
  if sum(sources) > 1 or not (any(sources) or text_alone):
    raise ValueError("Give one of --image, --images=DIR and --input=FILE.")
  if options.text is not None and not command.text:
    raise ValueError(
      f"--task={options.task} takes no --text; --prompt sets the beginning of a caption."
    )
  needs_text = command.text and not command.either and options.text is None
  if options.input:
    keys = [] if command.either else [command.image]
    keys += [command.text] if needs_text else []
    return lambda: jsonl.of_file(options.input, keys)
  if needs_text:
    raise ValueError(
      f"--task={options.task} needs a text: give --text, or --input=FILE with {command.image} "
      f"and {command.text} in each line."
    )
  if options.images:
    if command.image == "images":
      raise ValueError(
        f"--task={options.task} needs pairs of images: give --image twice, or --input=FILE."
      )
    return lambda: jsonl.of_folder(options.images)
  if command.image == "images":
    return lambda: iter([{"images": options.image}])
  return lambda: iter([{"image": image} for image in options.image] or [{}])


def _skip_done(output: jsonl.Results, rows: Iterator[Row], total: int) -> int:
  """Skips the rows that the output has; returns their number. Raises ValueError: other rows."""
  done = output.done
  if done > total:
    raise ValueError(
      f"{output.path} has {done} lines for {total} rows, so it belongs to another command; "
      "choose another --output."
    )
  if done:
    *_, last = itertools.islice(rows, done)
    output.check(last)
    print(f"{output.path} has {done} of {total} rows; continuing after them.", file=sys.stderr)
  return done


def _predict(
  predictor: Any,
  method: str,
  options: Namespace,
  rows: Iterator[Row],
  output: jsonl.Results | None,
  done: int,
  total: int,
) -> int:
  """Writes the lines of all rows, reading one batch ahead; returns the number of failed rows."""
  from mplug_jax.reporting import progress as progress_lib

  read = _reader(predictor, method, options)
  explain = _explaining(predictor, method, options)
  progress = progress_lib.Progress(total, enabled=total > 1, stream=sys.stderr)
  failed = 0
  listed: list[str] = []
  with ThreadPoolExecutor(1) as pool:
    batches = _batches(rows, predictor.batch_size)
    batch = next(batches, None)
    assert batch, "there are rows without a result"
    reading = pool.submit(read, batch)
    while batch:
      following = next(batches, None)
      read_batch = reading.result()
      if following:
        reading = pool.submit(read, following)
      lines, errors = _lines(predictor, method, options, batch, read_batch)
      explain(lines, read_batch, done)
      _write(lines, output)
      failed += errors
      done += len(batch)
      listed += [x["error"] for x in lines if "error" in x][: _LISTED_ERRORS - len(listed)]
      progress.update(done)
      batch = following
  progress.pause()
  if output:
    output.close()
  if failed:
    more = ["..."] if failed > len(listed) else []
    print(f"{failed} of {total} rows have no result:", *listed, *more, sep="\n  ", file=sys.stderr)
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


def _write(lines: Sequence[Row], output: jsonl.Results | None) -> None:
  if output:
    output.write(lines)
  else:
    print("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), flush=True)


def _lines(
  predictor: Any, method: str, options: Namespace, rows: Sequence[Row], batch: Inputs
) -> tuple[list[Row], int]:
  """Returns the output lines of a batch and the number of rows without a result."""
  command = methods.METHODS[method].command
  assert command is not None
  images, texts, errors = batch
  good = [number for number in range(len(rows)) if number not in errors]
  results = []
  if good:
    try:
      results = _call(
        predictor, method, [images[i] for i in good], [texts[i] for i in good], options
      )
    except ImageError as error:  # of a video, which is decoded by the call
      if len(good) == 1:
        batch = (images, texts, errors | {good[0]: str(error)})
        return _lines(predictor, method, options, rows, batch)
      return _halves(predictor, method, options, rows, batch)
  by_row = dict(zip(good, results))
  lines = []
  for i, row in enumerate(rows):
    used = {command.text: texts[i]} if texts[i] and command.text not in row else {}
    lines.append(row | used | by_row.get(i, {"error": errors.get(i)}))
  return lines, len(errors)


def _halves(
  predictor: Any, method: str, options: Namespace, rows: Sequence[Row], batch: Inputs
) -> tuple[list[Row], int]:
  """Returns `_lines` of both halves of a batch, to isolate a video that cannot be read."""
  images, texts, errors = batch
  lines: list[Row] = []
  failed = 0
  middle = len(rows) // 2
  for start, stop in ((0, middle), (middle, len(rows))):
    half_errors = {n - start: error for n, error in errors.items() if start <= n < stop}
    half = (images[start:stop], texts[start:stop], half_errors)
    half_lines, half_failed = _lines(predictor, method, options, rows[start:stop], half)
    lines += half_lines
    failed += half_failed
  return lines, failed


def _call(
  predictor: Any, method: str, images: Sequence, texts: Sequence, options: Namespace
) -> list[Row]:
  """Calls a method of the Predictor; returns one dictionary a row."""
  command = methods.METHODS[method].command
  assert command is not None
  if command.results:
    return command.results(predictor, images, texts, options)
  results = getattr(predictor, method)(images, texts, truncate=options.truncate)
  return [result._asdict() for result in results]


def _explaining(predictor: Any, method: str, options: Namespace) -> Callable:
  """Returns the function of --explain, which writes the maps and adds their paths to the lines.

  Its arguments are the lines, the result of a Reader, and the number of the first row.
  """
  if not options.explain:
    return lambda lines, batch, first: None
  row = methods.METHODS[method]
  if not row.explained:
    raise ValueError(f"--explain has no maps for --task={options.task}.")
  from mplug_jax.inference import explain

  explainer = explain.Explainer(predictor)
  arguments = {"truncate": options.truncate} if row.text else {"prompt": options.prompt}

  def write(lines: Sequence[Row], batch: Inputs, first: int) -> None:
    pairs = [
      None if "error" in line or isinstance(text, list) else (image, text)
      for line, image, text in zip(lines, *batch[:2])
    ]
    paths = explain.save_rows(explainer, method, pairs, options.explain, first, **arguments)
    for line, path in zip(lines, paths):
      if path:
        line["explained"] = path

  return write
