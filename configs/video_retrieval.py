"""Text-video retrieval, zero-shot: a model that was trained on images reads some frames of a clip as one long image.

    python -m mplug_jax.main --config=configs/retrieval.py --workdir=runs/retrieval
    python -m mplug_jax.main --config=configs/video_retrieval.py --mode=evaluate --checkpoint=runs/retrieval

searches among 200 rendered clips in which objects move. `frames=1,sampling=3` shows frame 3 alone, to see what a single image tells.

    python -m mplug_jax.main --config=configs/video_retrieval.py:large,data=msrvtt,root=/data/msrvtt --mode=evaluate --checkpoint=FOLDER \\
        --config.tokenizer.path=vocab.txt

is the paper's setting for the 1,000 test clips of MSR-VTT: 12 frames at 224 px, the best 128 candidates re-ranked by the sum of match
score and similarity. It reads test.jsonl under `root`, a line {"clip_name", "caption"} for each text, and videos/<clip_name>.mp4;
`tools.prepare_data msrvtt` writes it. The paper reports a text-to-video R@1 of 38.1 for large.
"""

import os

from configs import retrieval
from mplug_jax import config

_DATA = {"clips": False, "msrvtt": True}  # whether it is the paper's setting


def get_config(arg=""):
  arg = config.parse_arg(
    arg, data="clips", root="", frames=0, sampling="", res=0, steps=0, blank=False
  )
  paper = config.choose(_DATA, arg.data)
  c = config.variant(
    retrieval,
    arg,
    data="jsonl" if paper else "scenes",
    root=arg.root,
    res=arg.res or (224 if paper else 0),
    steps=arg.steps,
    blank=arg.blank,
  )
  c.name = "video_retrieval"
  c.data.update(
    {
      "name": arg.data,
      "frames": arg.frames or (12 if paper else 8),
      "frame_sampling": arg.sampling or ("official" if paper else "centres"),
    }
  )
  if paper:
    c.task.rerank_similarity = "add"
    c.data.update(
      {
        "test_file": os.path.join(arg.root, "test.jsonl"),
        "image_root": os.path.join(arg.root, "videos"),
        "video_suffix": ".mp4",
        "max_words": 40,
        "max_caption": 35,
      }
    )
    c.task.rerank_k = 128
    c.eval.batch_size = 16
  elif arg.size != "tiny":
    c.eval.limit = 200
  return c.lock()
