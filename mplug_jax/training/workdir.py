"""The run folder: config.json, tokenizer, result.json, parameters.txt; see data_fingerprint.py."""

import json
import os
from typing import Any

import jax
from clu import parameter_overview
from jax.experimental import multihost_utils

from mplug_jax import config as config_lib
from mplug_jax import data
from mplug_jax.config import Config
from mplug_jax.data.text import sentencepiece, tokenizer_base, wordpiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.data.types import Source
from mplug_jax.runtime import atomic_files, files


def prepare_tokenizer(
  config: Config, workdir: str, source: Source | None
) -> tokenizer_base.Tokenizer:
  """Returns the tokenizer of the run; process 0 writes it to the run folder if it is not there.

  The first of these that exists is used: the tokenizer in the run folder; the vocabulary in
  config.tokenizer.path; the tokenizer of the first run in config.init.paths that has one, because
  its token embeddings fit no other; a SentencePiece model fitted to the training texts.

  Args:
    config: config of the run.
    workdir: run folder.
    source: training records, whose texts a SentencePiece model is fitted to; None if none can be
      needed.

  Raises:
    ValueError: "wordpiece" has no vocabulary, the kind is unknown, or the tokenizer differs from
      that of a run in config.init.paths.
  """
  folder = os.path.join(workdir, "tokenizer")
  starts = [
    path
    for path in config.init.paths
    if files.open_path(os.path.join(path, "tokenizer", tokenizer_base.CONFIG_FILE)).exists()
  ]
  if (
    jax.process_index() == 0
    and not files.open_path(os.path.join(folder, tokenizer_base.CONFIG_FILE)).exists()
  ):
    kind, path = config.tokenizer.kind, config.tokenizer.path
    given = {
      "wordpiece": wordpiece.WordPieceTokenizer,
      "sentencepiece": sentencepiece.SentencePieceTokenizer,
    }
    if kind not in given:
      raise ValueError(f"config.tokenizer.kind={kind!r} is not one of {', '.join(given)}.")
    if path:
      given[kind](path).save(folder)
    elif starts:
      files.copy_folder(os.path.join(starts[0], "tokenizer"), folder)
    elif kind == "wordpiece":
      raise ValueError("config.tokenizer.path must name the vocab.txt of a wordpiece tokenizer.")
    else:
      sentencepiece.train_sentencepiece(
        data.texts(config, source),
        config.tokenizer.vocab_size,
        folder,
        sentencepiece.location_names(config.tokenizer.locations),
      )
  multihost_utils.sync_global_devices("tokenizer")
  tokenizer = tokenizer_lib.load(folder)
  for path in starts:
    tokenizer_base.check_same(
      tokenizer,
      tokenizer_lib.load(os.path.join(path, "tokenizer")).fingerprint,
      f"config.init.paths, {path}",
    )
  return tokenizer


def open_workdir(config: Config, workdir: str, resuming: bool) -> None:
  """Writes config.json, after comparing it with that of the run to resume.

  Args:
    config: config of the run.
    workdir: run folder.
    resuming: whether the folder holds a checkpoint; without one, a tokenizer that an earlier start
      left is removed.

  Raises:
    ValueError: the config differs from the run's in a setting that cannot change.
  """
  path = os.path.join(workdir, "config.json")
  text = config_lib.to_json(config)
  if not resuming:
    if jax.process_index() == 0:
      files.remove_folder(os.path.join(workdir, "tokenizer"))
  elif (earlier := files.open_path(path)).exists():
    refuse, notice = config_lib.resume_conflicts(
      json.loads(earlier.read_text(encoding="utf-8")), json.loads(text)
    )
    if refuse:
      raise ValueError(
        f"{workdir} holds a run of another configuration and cannot be resumed with this one "
        f"({'; '.join(refuse)}). "
        "Choose another --workdir, or repeat the run's own settings."
      )
    for line in notice:
      print(f"resuming with a difference: {line}", flush=True)
  if jax.process_index() == 0:
    atomic_files.write_atomic(path, text.encode())


def finished_result(workdir: str, total_steps: int) -> dict[str, Any] | None:
  """Returns the contents of result.json if the run in the folder is finished, else None.

  Args:
    workdir: run folder.
    total_steps: steps of the whole run.
  """
  path = files.open_path(os.path.join(workdir, "result.json"))
  if not path.exists():
    return None
  result = json.loads(path.read_text(encoding="utf-8"))
  return result if result["step"] >= total_steps else None


def report_parameters(workdir: str, params: Any) -> None:
  """Prints the number of parameters of each part and writes the full table to parameters.txt.

  Args:
    workdir: run folder.
    params: parameters of the model.
  """
  counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
  overview = parameter_overview.get_parameter_overview(params, include_stats=False)
  path = files.open_path(os.path.join(workdir, "parameters.txt"))
  path.write_text(overview + "\n", encoding="utf-8")
  parts = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in counts.items())
  print(f"parameters: {sum(counts.values()) / 1e6:.2f} million ({parts})", flush=True)
