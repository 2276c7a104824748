"""The sections of every config, with their defaults. The comments are the reference for users."""

from ml_collections import ConfigDict, config_dict

from mplug_jax.config.presets import PRESETS


def default_config(task, size):
  """The sections every config has, filled for the model size `size`; a config changes what its recipe needs.

  All durations are in updates unless they say epochs. The comments are the reference for users.
  """
  c = ConfigDict()
  c.name = task
  c.seed = 0
  c.batch_size = 32  # rows of the global batch
  c.total_steps = 0  # 0: total_epochs passes over the training data
  c.total_epochs = 0
  c.log_every = 50
  c.profile_steps = (0, 0)  # (first, last) updates to trace into workdir/profile; (0, 0): none
  c.compilation_cache = "~/.cache/mplug_jax"  # "" turns it off
  c.tensorboard = False  # event files beside metrics.jsonl
  c.task = ConfigDict({"name": task})
  c.model = ConfigDict(
    {
      "dtype": "float32",
      "remat": "none",
      "attention": "auto",
      "loss_chunk": 0,
      "fusion": "released",
      "pairing": "shared",
      "dropout": 0.1,
      "attention_dropout": 0.1,
      "vision_attention_dropout": 0.1,
      "vision_heads": 0,
      "initializer_range": 0.02,
      "classes": 2,
      "temperature": 0.07,
      "embed_dim": 256,
      **PRESETS[size],
    }
  )
  c.tokenizer = ConfigDict(
    {
      "kind": "wordpiece" if size in ("base", "large", "huge") else "sentencepiece",
      "path": "",  # vocab.txt of wordpiece; "" for sentencepiece: fitted to the training texts
      "vocab_size": 320,  # upper bound of a fitted one
      "locations": 0,  # tokens for box coordinates in a fitted one
      "records": 0,  # training records it is fitted to, evenly spaced; 0: all
    }
  )
  c.data = ConfigDict(
    {
      "frames": 0,  # of a clip that an example shows instead of an image; 0: images
      "frame_sampling": "centres",  # or "official", or the number of one frame: see data/video.py
      "fields": "",  # what annotation files call our keys, "question=q,image=file": see data/json_records.py
      "allow_overlap": False,  # val_file and test_file may be trained on, and be one file
      "shuffle_block": 0,  # so many neighbouring records stay near each other, for slow disks: see data/pipeline.py; 0: none
    }
  )
  c.loader = ConfigDict(
    {"workers": 0, "threads": 2}
  )  # Grain processes (0: none), else threads; neither changes the data
  c.optim = ConfigDict(
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
      "groups": config_dict.FieldReference(
        "plain", field_type=object
      ),  # a table by name, or rows: see optim.resolve_groups
      "schedule": ConfigDict({"name": "cosine", "warmup_steps": 200}, convert_dict=False),
      "microbatches": 1,  # the batch is split in this many parts, whose gradients are added
      "accumulate": "global",  # or "mean_of_means", the official division by each part's own count
    }
  )
  c.init = ConfigDict(
    {
      "paths": (),  # start from these: results of tools.convert_checkpoint, or runs; the first that has a parameter counts
      "new": (),
      "unused": (),  # regexes of parameters that may stay random; of those found that the model may lack
      "copies": (),  # (regex, replacement) pairs: a parameter that is nowhere found starts as the one of the other name
    }
  )
  c.ema = ConfigDict(
    {"decay": 0.0, "include": ".*", "use": "eval"}
  )  # decay 0: off; use: teacher, eval or both
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  c.checkpoint = ConfigDict(
    {
      "every": 1000,  # updates
      "keep": 2,  # the last ones, beside the best: should the newest be damaged, a run goes on from the one before
    }
  )
  c.eval = ConfigDict(
    {"every": 0, "batch_size": 64, "limit": 0, "split": "test"}
  )  # every 0: at the end; limit 0: all
  return c
