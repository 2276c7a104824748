r"""Zero-shot video question answering: an image model reads the frames of a clip as one long image.

    python -m mplug_jax.main --config=configs/vqa.py:data=scenes --workdir=runs/vqa_scenes
    python -m mplug_jax.main --config=configs/video_qa.py --mode=evaluate \
        --checkpoint=runs/vqa_scenes

answer questions about 200 rendered clips of moving objects. `frames=1,sampling=3` uses only frame
3, to measure the result from a single image.

    python -m mplug_jax.main --mode=evaluate --checkpoint=FOLDER \
        --config=configs/video_qa.py:base,data=video_qa,root=/data/msrvtt

is the paper's setting: 16 frames at 480 px, the most probable of the answers in answers.json. It
reads test.jsonl under `root`, one line per question: {"video_id", "question", "answer"}, and
videos/<video_id>.mp4; `tools.prepare_data` msrvtt_qa and msvd_qa write both. The paper reports 21.1
(MSR-VTT) and 37.2 (MSVD) for the base model; docs/official.md item 19 explains why these figures
are uncertain.
"""

import os

from configs import vqa
from mplug_jax import config

SOURCES = ("clips", "video_qa")


def get_config(arg: str = "") -> config.Config:
  """Returns the config of a zero-shot video question answering run."""
  options = config.parse_arg(
    arg, SOURCES, data="clips", root="", frames=0, sampling="", res=0, steps=0, black_images=False
  )
  paper = options.data == "video_qa"  # the paper's setting
  c = config.variant(
    vqa,
    options,
    data="jsonl" if paper else "scenes",
    root=options.root,
    res=options.res or (480 if paper else 0),
    steps=options.steps,
    black_images=options.black_images,
  )
  c.name = "video_qa"
  c.data.update(
    {
      "name": options.data,
      "frames": options.frames or (16 if paper else 8),
      "questions_per_image": 1 if paper else 5,
      "frame_sampling": options.sampling or ("official" if paper else "uniform"),
    }
  )
  c.eval.split = "test"
  if paper:
    c.data.update(
      {
        "video_root": os.path.join(options.root, "videos"),
        "video_suffix": ".mp4",
        "answer_list": os.path.join(options.root, "answers.json"),
      }
    )
    c.task.predict = "rank"
    c.eval.batch_size = 1
  elif options.size != "tiny":
    c.eval.limit = 200
  return c.lock()
