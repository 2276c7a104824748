"""Captioning of clips, zero-shot: a model that was trained on images reads some frames of a clip as one long image.

    python -m mplug_jax.main --config=configs/caption.py --workdir=runs/caption
    python -m mplug_jax.main --config=configs/video_caption.py --mode=evaluate --checkpoint=runs/caption

captions 200 rendered clips in which objects move. `frames=1,sampling=3` shows frame 3 alone, to see what a single image tells.

    python -m mplug_jax.main --config=configs/video_caption.py:large,data=vatex,root=/data/vatex --mode=evaluate --checkpoint=FOLDER \\
        --config.tokenizer.path=vocab.txt

is the paper's setting for VATEX: 8 frames at 448 px, the prompt "a picture of", beam 10. It reads test.json under `root`, a list of
{"videoID", "enCap": captions}, and videos/<videoID>.mp4; `tools.prepare_data vatex` writes it. The paper reports CIDEr 42.0 for large.
"""

import os

from configs import caption
from mplug_jax import config

_DATA = {"clips": False, "vatex": True}  # whether it is the paper's setting


def get_config(arg=""):
  arg = config.parse_arg(
    arg, data="clips", root="", frames=0, sampling="", res=0, steps=0, blank=False
  )
  paper = config.choose(_DATA, arg.data)
  c = config.variant(
    caption,
    arg,
    data="jsonl" if paper else "scenes",
    root=arg.root,
    res=arg.res or (448 if paper else 0),
    steps=arg.steps,
    blank=arg.blank,
  )
  c.name = "video_caption"
  c.data.update(
    {
      "name": arg.data,
      "frames": arg.frames or 8,
      "frame_sampling": arg.sampling or ("official" if paper else "centres"),
    }
  )
  if paper:
    c.data.update(
      {
        "test_file": os.path.join(arg.root, "test.json"),
        "image_root": os.path.join(arg.root, "videos"),
        "video_suffix": ".mp4",
        "max_caption": 32,
      }
    )
    c.task.update(
      {
        "prompt": "a picture of",
        "beams": 10,
        "min_length": 15,
        "max_length": 25,
        "beam_mode": "reference",
      }
    )
    c.eval.batch_size = 8
  elif arg.size != "tiny":
    c.eval.limit = 200
  return c.lock()
