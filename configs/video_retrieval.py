r"""Zero-shot text-video retrieval: an image model reads the frames of a clip as one long image.

    python -m mplug_jax.main --config=configs/retrieval.py --workdir=runs/retrieval
    python -m mplug_jax.main --config=configs/video_retrieval.py --mode=evaluate \
        --checkpoint=runs/retrieval

search among 200 rendered clips of moving objects. `frames=1,sampling=3` uses only frame 3,
to measure the result from a single image.

    python -m mplug_jax.main --mode=evaluate --checkpoint=FOLDER --config.tokenizer.path=vocab.txt \
        --config=configs/video_retrieval.py:large,data=msrvtt,root=/data/msrvtt

is the paper's setting for the 1,000 test clips of MSR-VTT: 12 frames at 224 px, the best 128
candidates re-ranked by the sum of match score and similarity. It reads test.jsonl under `root`, one
line per text: {"clip_name", "caption"}, and videos/<clip_name>.mp4; `tools.prepare_data msrvtt`
writes it. The paper reports a text-to-video R@1 of 38.1 for large.
"""

import os

from configs import retrieval
from mplug_jax import config

SOURCES = ("clips", "msrvtt")


def get_config(arg: str = "") -> config.Config:
  """Returns the config of a zero-shot text-video retrieval run."""
  options = config.parse_arg(
    arg, SOURCES, data="clips", root="", frames=0, sampling="", res=0, steps=0, black_images=False
  )
  paper = options.data == "msrvtt"  # the paper's setting
  c = config.variant(
    retrieval,
    options,
    data="jsonl" if paper else "scenes",
    root=options.root,
    res=options.res or (224 if paper else 0),
    steps=options.steps,
    black_images=options.black_images,
  )
  c.eval.split = "test"
  c.name = "video_retrieval"
  c.data.update(
    {
      "name": options.data,
      "frames": options.frames or (12 if paper else 8),
      "frame_sampling": options.sampling or ("official" if paper else "uniform"),
    }
  )
  if paper:
    c.task.rerank_similarity = "add"
    c.data.update(
      {
        "test_file": os.path.join(options.root, "test.jsonl"),
        "image_root": os.path.join(options.root, "videos"),
        "video_suffix": ".mp4",
        "max_words": 40,
        "max_caption": 35,
      }
    )
    c.task.rerank_k = 128
    c.eval.batch_size = 16
  elif options.size != "tiny":
    c.eval.limit = 200
  return c.lock()
