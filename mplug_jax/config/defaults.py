"""Default values of every section of a config; the comments are the reference for users."""

from typing import Any

from ml_collections import ConfigDict, config_dict

from mplug_jax.config.presets import PAPER_SIZES, PRESETS


def default_config(task: str, size: str) -> Any:
  """Returns the default config; a config file changes what its recipe needs.

  All durations are in updates unless their name says epochs.

  Args:
    task: name of the task.
    size: name of the model size in PRESETS.
  """
  c = ConfigDict()
  c.name = task
  c.seed = 0
  # How keys of dropout and parameters are derived: "hash", see ops/prng.py, or "jax", as before
  # this option.
  c.prng_impl = "hash"
  c.batch_size = 32  # rows of the global batch
  c.total_steps = 0  # 0: total_epochs passes over the training data
  c.total_epochs = 0
  c.log_every = 50
  c.profile_steps = (0, 0)  # (first, last) updates to trace into workdir/profile; (0, 0): none
  c.compilation_cache = "~/.cache/mplug_jax"  # "" turns it off
  c.tensorboard = False  # event files in addition to metrics.jsonl
  c.task = ConfigDict({"name": task})
  c.model = _model(size)
  c.tokenizer = ConfigDict(
    {
      "kind": "wordpiece" if size in PAPER_SIZES else "sentencepiece",
      "path": "",  # vocab.txt of wordpiece; "" for sentencepiece: fitted to the training texts
      "vocab_size": 320,  # upper bound of a fitted one
      "locations": 0,  # tokens for box coordinates in a fitted one
      "records": 0,  # training records it is fitted to, evenly spaced; 0: all
    }
  )
  c.data = _data()
  # Grain processes (0: none), else threads; neither changes the data.
  c.loader = ConfigDict({"workers": 0, "threads": 2})
  c.optim = _optim()
  c.init = ConfigDict(
    {
      # Results of tools.convert_checkpoint, or runs; the first that has a parameter provides it.
      "paths": (),
      "new": (),  # regexes of parameters that may stay random
      "unused": (),  # regexes of parameters in the paths that the model may lack
      # (regex, replacement) pairs: a parameter that no path has is copied from the one so named.
      "copies": (),
    }
  )
  # decay 0: off; use: teacher, eval or both.
  c.ema = ConfigDict({"decay": 0.0, "include": ".*", "use": "eval"})
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  c.checkpoint = ConfigDict(
    {
      "every": 1000,  # updates
      "keep": 2,  # recent ones, besides the best: a run resumes from the second if one is damaged
    }
  )
  # every 0: at the end; limit 0: all.
  c.eval = ConfigDict({"every": 0, "batch_size": 64, "limit": 0, "split": "test"})
  return c


def _model(size: str) -> Any:
  """Returns the model section; geometry from PRESETS."""
  return ConfigDict(
    {
      "dtype": "float32",
      "remat": "none",
      "attention_impl": "auto",
      # "reference" turns off all hand-written gradient rules, generators and kernels, see ops/.
      "ops": "auto",
      "loss_chunk": 0,
      "fusion": "released",
      "pairing": "shared",
      "dropout_rate": 0.1,
      "attention_dropout_rate": 0.1,
      "vision_attention_dropout_rate": 0.1,
      "vision_heads": 0,
      "initializer_range": 0.02,
      "classes": 2,
      "temperature": 0.07,
      "embed_dim": 256,
      **PRESETS[size],
    }
  )


def _data() -> Any:
  """Returns the fields of the data section that all sources share."""
  return ConfigDict(
    {
      "frames": 0,  # of a clip that an example shows instead of an image; 0: images
      # or "official", or the number of one frame: see data/images/video.py
      "frame_sampling": "uniform",
      # Keys of the annotation files, as "question=q,image=file": see data/storage/annotations.py
      "fields": "",
      "allow_overlap": False,  # the same file may be used for several splits
      # Number of adjacent records that stay together in the shuffle, for slow disks; 0: none.
      # See data/pipeline.py.
      "shuffle_block": 0,
    }
  )


def _optim() -> Any:
  """Returns the optimizer section."""
  return ConfigDict(
    {
      "name": "adamw",
      "lr": 1e-3,
      "visual_lr": 1e-3,
      "weight_decay": 0.02,
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "momentum": 0.95,
      "mu_dtype": "float32",
      "clip": 1.0,
      # A table by name, or rows: see optim.groups.resolve_groups.
      "groups": config_dict.FieldReference("plain", field_type=object),
      "schedule": ConfigDict({"name": "cosine", "warmup_steps": 200}, convert_dict=False),
      "microbatches": 1,  # the batch is split into this many parts; their gradients are added
      # or "mean_of_means", the official division by the count of each part
      "accumulate": "global",
    }
  )
