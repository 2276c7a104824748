r"""Zero-shot video captioning: an image model reads the frames of a clip as one long image.

    python -m mplug_jax.main --config=configs/caption.py --workdir=runs/caption
    python -m mplug_jax.main --config=configs/video_caption.py --mode=evaluate \
        --checkpoint=runs/caption

caption 200 rendered clips of moving objects. `frames=1,sampling=3` uses only frame 3, to measure
the result from a single image.

    python -m mplug_jax.main --mode=evaluate --checkpoint=FOLDER --config.tokenizer.path=vocab.txt \
        --config=configs/video_caption.py:large,data=vatex,root=/data/vatex

is the paper's setting for VATEX: 8 frames at 448 px, the prompt "a picture of", beam 10. It reads
test.json under `root`, a list of {"videoID", "enCap": captions}, and videos/<videoID>.mp4;
`tools.prepare_data vatex` writes it. The paper reports CIDEr 42.0 for large.
"""

import os

from configs import caption
from mplug_jax import config

SOURCES = ("clips", "vatex")


def get_config(arg: str = "") -> config.Config:
  """Returns the config of a zero-shot video captioning run."""
  options = config.parse_arg(
    arg, SOURCES, data="clips", root="", frames=0, sampling="", res=0, steps=0, black_images=False
  )
  paper = options.data == "vatex"  # the paper's setting
  c = config.variant(
    caption,
    options,
    data="jsonl" if paper else "scenes",
    root=options.root,
    res=options.res or (448 if paper else 0),
    steps=options.steps,
    black_images=options.black_images,
  )
  c.eval.split = "test"
  c.name = "video_caption"
  c.data.update(
    {
      "name": options.data,
      "frames": options.frames or 8,
      "frame_sampling": options.sampling or ("official" if paper else "uniform"),
    }
  )
  if paper:
    c.data.update(
      {
        "test_file": os.path.join(options.root, "test.json"),
        "image_root": os.path.join(options.root, "videos"),
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
  elif options.size != "tiny":
    c.eval.limit = 200
  return c.lock()
