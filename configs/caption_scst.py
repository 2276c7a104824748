r"""Image captioning trained on CIDEr-D with self-critical sequence training (SCST).

    python -m mplug_jax.main --config=configs/caption_scst.py:init=runs/caption

continues from a run of configs/caption.py with the same size, data, model and tokenizer. In every
step the model generates five captions per image, and captions that score above the mean of the five
become more probable.

    python -m mplug_jax.main \
        --config=configs/caption_scst.py:base,data=karpathy,root=/data/coco,init=runs/caption

is the paper's recipe: batch 128 (large: 256), 5 epochs, five beams without dropout
(task.sample_dropout=true: with dropout, as official, docs/official.md item 46). The paper reports
CIDEr 150.4 (base) and 155.1 (large).
"""

from configs import caption
from mplug_jax import config

SOURCES = caption.SOURCES
REQUIRED = "init=runs/caption"  # for every size but tiny


def get_config(arg: str = "") -> config.Config:
  """Returns the config of an SCST run."""
  options = config.parse_arg(
    arg, SOURCES, data="scenes", root="", init="", res=0, steps=0, black_images=False
  )
  if not options.init and options.size != "tiny":
    raise ValueError(
      f"configs/caption_scst.py continues from a captioning run: name its folder, as {REQUIRED}."
    )
  c = caption.get_config(arg).unlock()
  c.name = "caption_scst"
  c.task.update(
    {
      "name": "scst",
      "candidates": "sample",  # or "beam": the best of a beam search
      "count": 5,
      "baseline": "mean",  # of the candidates; or "greedy": the reward of the greedy caption
      "normalize": "none",  # or "official": divided by the length penalty and by the length
      "sample_dropout": False,
    }
  )
  if options.size in config.PAPER_SIZES:
    _paper(c, options.size)
  elif options.size == "small":
    c.optim.lr = 1e-4
    if options.data == "scenes":
      c.total_steps = options.steps or 600
  return c.lock()


def _paper(c: config.Config, size: str) -> None:
  """Sets the official recipe: beams, both normalizations, a falling warm-up."""
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
