"""The job of a predict command: its rows, the keys of its results, what they depend on. No JAX."""

import hashlib
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mplug_jax import config as config_lib
from mplug_jax.inference import jsonl, methods, result_file
from mplug_jax.runtime import files

Row = dict[str, Any]


class Job(NamedTuple):
  """Job of a predict command.

  Attributes:
    method: of the Predictor.
    command: the method's use by the command.
    rows: function that iterates over the rows from the first.
    total: number of rows.
    keys: keys of all rows.
    names: {key of a result: key that is written}, of the known results, "explained" and "error".
    is_known: whether `names` has the keys of all results.
    description: what the results depend on.
  """

  method: str
  command: methods.Command
  rows: Callable[[], Iterator[Row]]
  total: int
  keys: set[str]
  names: dict[str, str]
  is_known: bool
  description: dict[str, Any]

  def name(self, key: str) -> str:
    """Returns the key under which a result is written, see `_name`."""
    return self.names.get(key) or _name(key, self.keys)


def of_options(options: Namespace) -> Job:
  """Reads every row once and describes the job.

  Args:
    options: of the command line.

  Returns:
    The Job; its description is empty without --output.

  Raises:
    ValueError, OSError: the command makes no sense, or a row cannot be read; one sentence.
  """
  method = methods.commands()[options.task]
  command = methods.METHODS[method].command
  assert command is not None
  rows = _rows(options, method)
  same = (options.input, options.output)
  if all(same) and all(map(os.path.exists, same)) and os.path.samefile(*same):
    raise ValueError(f"--output={options.output} is the file of --input; choose another --output.")
  keys: set[str] = set()
  total = 0
  hashed = hashlib.sha256()
  for row in rows():
    keys |= row.keys()
    total += 1
    hashed.update(result_file.to_line(row).encode())
  outputs = command.outputs(options) if command.outputs else None
  names = {key: _name(key, keys) for key in (*(outputs or ()), "explained", "error")}
  job = Job(method, command, rows, total, keys, names, outputs is not None, {})
  if not options.output:
    return job
  folder = os.path.abspath(os.path.dirname(options.input)) if options.input else ""
  config = options.config and config_lib.to_json(config_lib.load(options.config))
  description = {
    "task": options.task,
    "checkpoint": _absolute(options.checkpoint),
    "weights": result_file.digest(options.checkpoint),
    "config": config and hashlib.sha256(config.encode()).hexdigest(),
    "tokenizer": options.tokenizer and result_file.digest(options.tokenizer),
    "folder of the images": folder,
    "rows": hashed.hexdigest(),
    **{name: getattr(options, name) for name in ("text", "prompt", "n", "truncate")},
    "explain": options.explain and os.path.abspath(options.explain),
  }
  return job._replace(description=description)


def _absolute(path: str) -> str:
  return path if files.is_remote(path) else os.path.abspath(path)


def _name(key: str, keys: set[str]) -> str:
  """Returns the key under which a result is written, which no row has.

  A key that rows have, such as the true answer's, is theirs: the result gets "predicted_".

  Args:
    key: key of a result.
    keys: keys of all rows.

  Raises:
    ValueError: rows have that key too.
  """
  name = f"predicted_{key}" if key in keys else key
  if name in keys:
    raise ValueError(
      f"Rows have the keys {key} and {name}, so that the result has no key of its own; rename one "
      "in the input."
    )
  return name


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
    images = jsonl.of_folder(options.images)
    return lambda: iter(images)
  if command.image == "images":
    return lambda: iter([{"images": options.image}])
  return lambda: iter([{"image": image} for image in options.image] or [{}])
