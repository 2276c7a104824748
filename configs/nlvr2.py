"""Statements about two images: true or false?

    python -m mplug_jax.main --config=configs/grounding.py
    python -m mplug_jax.main --config=configs/snli_ve.py:init=runs/grounding
    python -m mplug_jax.main --config=configs/nlvr2.py:steps=1000,init=runs/snli_ve --config.data.easier=0.9
    python -m mplug_jax.main --config=configs/nlvr2.py:steps=1600,init=runs/nlvr2 --config.data.easier=0.4 --workdir=runs/nlvr2_on
    python -m mplug_jax.main --config=configs/nlvr2.py:steps=700,init=runs/nlvr2_on --config.data.easier=0.1 --workdir=runs/nlvr2_last

trains the small preset on pairs of generated scenes ("exactly one of the two images shows a red square"), first on easier statements,
most of them about one of the images. Without init= it begins at random and stays at chance for long, and from grounding alone as well:
entailment teaches whether something is there, and where.
`:blank=true` shows black images instead: nothing but chance is left.

    python -m mplug_jax.main --config=configs/nlvr2.py:base,data=nlvr2,root=/data/nlvr2,init=FOLDER --config.tokenizer.path=vocab.txt

is ALBEF's recipe: 384 px, batch 128, 10 epochs, distillation from the averaged weights. It reads nlvr_train.json, nlvr_dev.json and
nlvr_test.json under `root`, lists of {"sentence", "label": "True" or "False", "images": [left, right]}, images under `root`, which
`tools.prepare_data nlvr2` makes of what is distributed. The paper reports 84.58 (dev) and 84.95 (test-P) for the large model, from its
pre-trained weights: convert them with tools.convert_checkpoint for `init`. What mPLUG's own model for two images was is not published:
by default a sentence is fused with each image by the same layers.

`pairing=duplicated` is ALBEF's model, with a layer for each of the two images. ALBEF prepares it by text assignment: which of two
images does a caption describe, the first, the second or neither?

    python -m mplug_jax.main --config=configs/nlvr2.py:base,data=captions,root=/data/captions,init=FOLDER \\
        --config.tokenizer.path=vocab.txt --workdir=runs/assignment
    python -m mplug_jax.main --config=configs/nlvr2.py:base,data=nlvr2,root=/data/nlvr2,init=runs/assignment,pairing=duplicated \\
        --config.tokenizer.path=vocab.txt

It reads train.json, val.json and test.json under `root`, lists of {"image", "caption"}; `data=scene_captions` is the same on scenes.

    python -m mplug_jax.main --config=configs/nlvr2.py:data=jsonl,root=/my/data,labels=same/different

reads train.jsonl and val.jsonl under `root`, a line {"images": [first, second], "sentence", "label"} for each example. Other formats,
data=jsonl:FILE, other keys and archives: as in configs/vqa.py.
"""

from configs import snli_ve
from mplug_jax import config


def get_config(arg=""):
  arg = config.parse_arg(
    arg, data="scenes", root="", labels="", pairing="", init="", res=0, steps=0, blank=False
  )
  assignment = arg.data in ("captions", "scene_captions")
  c = config.default_config("nlvr2", arg.size)
  snli_ve.classification(
    c, arg, images=2, labels=("first", "second", "neither") if assignment else ("False", "True")
  )
  config.choose(_DATA, arg.data)(c, arg)
  c.model.pairing = arg.pairing or ("duplicated" if assignment else "shared")
  if arg.size in ("base", "large", "huge"):
    snli_ve.paper(
      c, arg.size, batch_size=256 if assignment else 128, epochs=1 if assignment else 10
    )
    if assignment:
      c.model.image_size = 256 if c.model.patch_size == 16 else 252  # a multiple of the patch size
  if c.model.pairing == "duplicated":
    # The second layer of a pair starts as the first one.
    c.init.copies = ((r"fusion_encoder/second_(\d+)/(.*)", r"fusion_encoder/layer_\1/\2"),)
  return snli_ve.finish(c, arg)


def _scenes(c, arg):
  snli_ve.scenes(c, arg)
  c.total_steps = 1500
  c.batch_size = 16  # pairs, each with eight statements: two images cost twice the time
  c.data.max_text = 24
  if arg.size == "small":
    c.data.sentences_per_row = 8
    if arg.init:
      c.optim.lr = 2.5e-4  # at twice that, and with half the statements, relations that entailment knew were forgotten


def _nlvr2(c, arg):
  snli_ve.read_files(c, arg, "nlvr_train.json", "nlvr_dev.json", "nlvr_test.json", "")
  c.data.swap = 0.5


def _captions(c, arg):
  snli_ve.read_files(c, arg, "train.json", "val.json", "test.json", "")
  c.data.seed = 0


def _scene_captions(c, arg):
  snli_ve.scenes(c, arg)
  # Captions are longer than statements, and the mirror would exchange first and second.
  c.data.update({"max_text": 40, "mirror": 0.0, "sentences_per_row": 1})


_DATA = {
  "scenes": _scenes,
  "nlvr2": _nlvr2,
  "jsonl": snli_ve.own_data,
  "captions": _captions,
  "scene_captions": _scene_captions,
}
