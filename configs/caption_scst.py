"""Image captioning, trained on CIDEr-D by self-critical sequence training (SCST).

    python -m mplug_jax.main --config=configs/caption_scst.py:init=runs/caption

goes on from a run of configs/caption.py, with the same size, data and model, and with its tokenizer: in every update the model
captions each image five times, and captions that score above the mean of the five become more probable.

    python -m mplug_jax.main --config=configs/caption_scst.py:base,data=karpathy,root=/data/coco,init=runs/caption

is the paper's recipe: batch 128 (large: 256), 5 epochs, five beams without dropout (task.sample_dropout=true: with, as
official, docs/official.md item 46). The paper reports CIDEr 150.4 (base) and 155.1 (large).
"""

from configs import caption
from mplug_jax import config

_DATA = caption._DATA
_REQUIRED = "init=runs/caption"  # by every size but tiny


def get_config(arg=""):
  c = caption.get_config(arg)
  arg = config.parse_arg(arg, data="scenes", root="", init="", res=0, steps=0, blank=False)
  if not arg.init and arg.size != "tiny":
    raise ValueError(
      f"configs/caption_scst.py goes on from a captioning run: name its folder, as {_REQUIRED}."
    )
  with c.unlocked():
    c.name, c.task.name = "caption_scst", "scst"
    c.task.update(
      {
        "candidates": "sample",
        "count": 5,  # "beam": the best of a beam search
        "baseline": "mean",  # of the candidates; or "greedy": the reward of the greedy caption
        "normalize": "none",  # "official": divided by the length penalty and by the length
        "sample_dropout": False,
      }
    )
    if arg.size in ("base", "large", "huge"):
      _paper(c, arg.size)
    elif arg.size == "small":
      c.optim.lr = 1e-4
      if arg.data == "scenes":
        c.total_steps = arg.steps or 600
  return c.lock()


def _paper(c, size):
  """The official recipe: beams, both normalisations, a warm-up that goes down."""
  c.task.update({"candidates": "beam", "normalize": "official"})
  c.batch_size = 128 if size == "base" else 256
  c.optim.update({"lr": 1e-6, "visual_lr": 1e-6})
  c.optim.schedule = {
    "name": "official",
    "epochs": 5,
    "warmup_units": 4,
    "warmup_lr": 1e-5,
    "min_lr": 8e-8,
  }
