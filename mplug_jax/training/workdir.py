"""The run folder: config.json, tokenizer, result.json, parameters.txt."""

import json
import os
import shutil

import jax
from clu import parameter_overview
from jax.experimental import multihost_utils

from mplug_jax import config as config_lib
from mplug_jax import data
from mplug_jax.data.text import sentencepiece, tokenizer_base, wordpiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.runtime import atomic_files


def prepare_tokenizer(config, workdir, source):
  """The run's tokenizer: the one in its folder, else a given vocabulary, else that of the first run in config.init.paths that has one, for
  its token embeddings are of no use with another, else one fitted to the training texts by process
  0.

  Raises:
    ValueError: no vocabulary for "wordpiece", an unknown kind, or another tokenizer than that of a
      run in config.init.paths.
  """
  folder = os.path.join(workdir, "tokenizer")
  starts = [
    path
    for path in config.init.paths
    if os.path.exists(os.path.join(path, "tokenizer", tokenizer_base.CONFIG_FILE))
  ]
  if jax.process_index() == 0 and not os.path.exists(
    os.path.join(folder, tokenizer_base.CONFIG_FILE)
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
      shutil.copytree(os.path.join(starts[0], "tokenizer"), folder)
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


def open_workdir(config, workdir, resuming):
  """Writes config.json.

  Compares it with the one of the run to resume, or clears what a start without a checkpoint left.

  Raises:
    ValueError: the config differs from the run's in what cannot change.
  """
  path = os.path.join(workdir, "config.json")
  text = config_lib.to_json(config)
  if not resuming:
    if jax.process_index() == 0:
      shutil.rmtree(os.path.join(workdir, "tokenizer"), ignore_errors=True)
  elif os.path.exists(path):
    with open(path) as file:
      refuse, notice = config_lib.resume_conflicts(json.load(file), json.loads(text))
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


def finished_result(workdir, total_steps):
  """The result of a finished run in this folder, or None."""
  path = os.path.join(workdir, "result.json")
  if not os.path.exists(path):
    return None
  with open(path) as file:
    result = json.load(file)
  return result if result["step"] >= total_steps else None


def report_parameters(workdir, params):
  """Prints the model's size by part; leaves the full table in parameters.txt."""
  counts = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
  with open(os.path.join(workdir, "parameters.txt"), "w") as file:
    file.write(parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")
  parts = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in counts.items())
  print(f"parameters: {sum(counts.values()) / 1e6:.2f} million ({parts})", flush=True)
