"""Question answering about clips, zero-shot: a model that was trained on images reads some frames of a clip as one long image.

    python -m mplug_jax.main --config=configs/vqa.py:data=scenes --workdir=runs/vqa_scenes
    python -m mplug_jax.main --config=configs/video_qa.py --mode=evaluate --checkpoint=runs/vqa_scenes

asks about 200 rendered clips in which objects move. `frames=1,sampling=3` shows frame 3 alone, to see what a single image tells.

    python -m mplug_jax.main --config=configs/video_qa.py:base,data=video_qa,root=/data/msrvtt --mode=evaluate --checkpoint=FOLDER

is the paper's setting: 16 frames at 480 px, the most probable of the answers in answers.json. It reads test.jsonl under `root`, a line
{"video_id", "question", "answer"} for each question, and videos/<video_id>.mp4; `tools.prepare_data` msrvtt_qa and msvd_qa write both.
The paper reports 21.1 (MSR-VTT) and 37.2 (MSVD) for the base model; docs/official.md item 19 says why these figures are uncertain.
"""

import os

from configs import vqa
from mplug_jax import config

_DATA = {"clips": False, "video_qa": True}  # whether it is the paper's setting


def get_config(arg=""):
  arg = config.parse_arg(
    arg, data="clips", root="", frames=0, sampling="", res=0, steps=0, blank=False
  )
  paper = config.choose(_DATA, arg.data)
  c = config.variant(
    vqa,
    arg,
    data="jsonl" if paper else "scenes",
    root=arg.root,
    res=arg.res or (480 if paper else 0),
    steps=arg.steps,
    blank=arg.blank,
  )
  c.name = "video_qa"
  c.data.update(
    {
      "name": arg.data,
      "frames": arg.frames or (16 if paper else 8),
      "questions_per_image": 1 if paper else 5,
      "frame_sampling": arg.sampling or ("official" if paper else "centres"),
    }
  )
  c.eval.split = "test"
  if paper:
    c.data.update(
      {
        "video_root": os.path.join(arg.root, "videos"),
        "video_suffix": ".mp4",
        "answer_list": os.path.join(arg.root, "answers.json"),
      }
    )
    c.task.predict = "rank"
    c.eval.batch_size = 1
  elif arg.size != "tiny":
    c.eval.limit = 200
  return c.lock()
