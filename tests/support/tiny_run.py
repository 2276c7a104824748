"""The tiny VQA run that the tests of the train loop share: its config, tokenizer and data."""

import importlib.util
import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data import pipeline
from mplug_jax.data.sources import vqa
from mplug_jax.data.text import sentencepiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.parallel import rules
from mplug_jax.reporting import metric_log
from tests.support.paths import ROOT

# Runs of one program, whatever their length: with equal settings they share compiled programs.
SETTINGS = {
  "log_every": 1,
  "eval.limit": 10,
  "eval.batch_size": 8,
  "optim.schedule.name": "constant",
  "optim.clip": 0.0,
  "ema.decay": 0.9,
  "compilation_cache": "",
  # One layer of a kind is enough for what surrounds the model.
  "model.vision_layers": 1,
  "model.fusion_layers": 1,
}
# Changes of `config` that turn dropout off.
NO_DROPOUT = {
  "model__dropout_rate": 0.0,
  "model__attention_dropout_rate": 0.0,
  "model__vision_attention_dropout_rate": 0.0,
}


def start(workdir, settings, *flags, config="vqa.py:tiny", devices=8, use=0, sleep=0.0):
  """Starts `python -m mplug_jax.main` on the tiny config of a task, see main_worker.py.

  Args:
    settings: {"section.field": value} of the config.
    flags: further flags of main. config: file of configs/ and its argument.
    devices: virtual CPU devices of the process. use: how many of them the run uses, 0 = all.
    sleep: seconds after every update.
  """
  xla_flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
  command = [
    sys.executable,
    str(ROOT / "tests" / "support" / "main_worker.py"),
    str(use),
    str(sleep),
    f"--config={ROOT}/configs/{config}",
    f"--workdir={workdir}",
    *flags,
  ]
  return subprocess.Popen(
    command + [f"--config.{name}={value}" for name, value in settings.items()],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, "PYTHONPATH": str(ROOT)},
  )


def wait_for_lines(path, count, process):
  """Returns when the file has so many lines, or the process has ended."""
  while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= count):
    time.sleep(0.005)


def finish(process):
  """-> the lines printed, once the process has ended with status 0 and no error on stderr."""
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert "Traceback" not in err, err
  assert "error:" not in err, err
  return out.splitlines()


def config(arg="tiny", **changes):
  """configs/vqa.py with `arg`; `changes` are written section__field=value."""
  spec = importlib.util.spec_from_file_location("vqa_config", ROOT / "configs" / "vqa.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  c = module.get_config(arg)
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return c


def tokenizer(folder, c):
  """A SentencePiece model fitted to the training texts, in `folder`."""
  sentencepiece.train_sentencepiece(
    vqa.texts(vqa.get(c.data, "train")), c.tokenizer.vocab_size, folder
  )
  return tokenizer_lib.load(folder)


def batch(c, tokenizer):
  """Returns the first training batch as numpy arrays; rows count unequally."""
  source = vqa.get(c.data, "train")
  batches = pipeline.train_batches(
    source,
    data.make_transform(c, tokenizer, train=True),
    batch_size=c.batch_size,
    seed=c.seed,
    threads=0,
  )
  out = {k: np.array(v) for k, v in next(batches).items()}
  batches.close()
  for row in range(c.batch_size):
    out["question_valid"][row, row % c.data.questions_per_image + 1 :] = False
  out["answer_weight"] *= (
    out["question_valid"][..., None]
    * np.linspace(0.25, 1.0, c.batch_size, dtype=np.float32)[:, None, None]
  )
  return out


def flat(tree):
  """Pytree -> {path: numpy array}; a random key as its integers."""

  def numpy(x):
    return np.asarray(
      jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    )

  return {rules.path_name(path): numpy(x) for path, x in jax.tree.leaves_with_path(tree)}


def assert_gradients_equal(ours, reference, share=1e-4):
  """The bound on what a mesh may change: a share of each tensor's largest value, or 1e-7.

  Both are {path: array}.
  """
  assert ours.keys() == reference.keys()
  for name, expected in reference.items():
    bound = max(share * np.abs(expected).max(), 1e-7)
    assert np.abs(ours[name] - expected).max() <= bound, name


_SPEEDS = (
  "steps_per_sec",
  "examples_per_sec",
  "data_wait_sec",
  "data_wait_share",
  "host_share",
  "compute_share",
  "mfu",
)


def lines(workdir):
  """The lines of metrics.jsonl without what depends on the speed of the machine."""
  rows = metric_log.read_metrics(os.path.join(workdir, "metrics.jsonl"))
  return [{k: v for k, v in row.items() if k.removeprefix("train/") not in _SPEEDS} for row in rows]


def refused(call, *messages):
  """`call` raises ValueError or FileNotFoundError with a sentence that holds all the messages."""
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    call()
  assert "\n" not in str(error.value)
  for message in messages:
    assert message in str(error.value), str(error.value)
