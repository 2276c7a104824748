r"""Visual reasoning (NLVR2): is a statement about two images true or false?

    python -m mplug_jax.main --config=configs/grounding.py
    python -m mplug_jax.main --config=configs/snli_ve.py:init=runs/grounding
    python -m mplug_jax.main --config=configs/nlvr2.py:steps=1000,init=runs/snli_ve \
        --config.data.easy_fraction=0.9
    python -m mplug_jax.main --config=configs/nlvr2.py:steps=1600,init=runs/nlvr2 \
        --config.data.easy_fraction=0.4 --workdir=runs/nlvr2_on
    python -m mplug_jax.main --config=configs/nlvr2.py:steps=700,init=runs/nlvr2_on \
        --config.data.easy_fraction=0.1 --workdir=runs/nlvr2_last

train the small preset on pairs of generated scenes ("exactly one of the two images shows a red
square"), first on easier statements, most of them about one of the images. Without init=, and also
from grounding only, accuracy stays at chance for long: entailment teaches whether an object is
present, and where. `:black_images=true` replaces all images with black ones: accuracy is then at
chance.

    python -m mplug_jax.main --config.tokenizer.path=vocab.txt \
        --config=configs/nlvr2.py:base,data=nlvr2,root=/data/nlvr2,init=FOLDER

is ALBEF's recipe: 384 px, batch 128, 10 epochs, distillation from the averaged weights. It reads
nlvr_train.json, nlvr_dev.json and nlvr_test.json under `root`, lists of {"sentence", "label":
"True" or "False", "images": [left, right]}, with images under `root`; `tools.prepare_data nlvr2`
writes them from the distributed files. The paper reports 84.58 (dev) and 84.95 (test-P) for the
large model, from its pre-trained weights: convert them with tools.convert_checkpoint for `init`.
The mPLUG model for two images is not published: by default the same layers fuse a sentence with
each image.

`pairing=duplicated` is ALBEF's model, with one layer for each of the two images. ALBEF pre-trains
it by text assignment: does a caption describe the first image, the second or neither?

    python -m mplug_jax.main --config.tokenizer.path=vocab.txt --workdir=runs/assignment \
        --config=configs/nlvr2.py:base,data=captions,root=/data/captions,init=FOLDER
    python -m mplug_jax.main --config.tokenizer.path=vocab.txt \
        --config=configs/nlvr2.py:base,data=nlvr2,root=/data,init=runs/assignment,pairing=duplicated

The first reads train.json, val.json and test.json under `root`, lists of {"image", "caption"};
`data=scene_captions` does the same on scenes.

    python -m mplug_jax.main \
        --config=configs/nlvr2.py:data=jsonl,root=/my/data,labels=same/different

reads train.jsonl and val.jsonl under `root`, one line per example: {"images": [first, second],
"sentence", "label"}. Other formats, data=jsonl:FILE, other keys and archives: see configs/vqa.py.
"""

from configs import snli_ve
from mplug_jax import config

SOURCES = ("scenes", "nlvr2", "jsonl", "captions", "scene_captions")


def get_config(arg: str = "") -> config.Config:
  """Returns the config of a run on pairs of images."""
  options = config.parse_arg(
    arg,
    SOURCES,
    data="scenes",
    root="",
    labels="",
    pairing="",
    init="",
    res=0,
    steps=0,
    black_images=False,
  )
  assignment = options.data in ("captions", "scene_captions")
  labels = ("first", "second", "neither") if assignment else ("False", "True")
  c = config.default_config("nlvr2", options.size)
  snli_ve.classification(c, options, images=2, labels=labels)
  _data(c, options)
  c.model.pairing = options.pairing or ("duplicated" if assignment else "shared")
  if options.size in config.PAPER_SIZES and assignment:
    snli_ve.paper(c, options.size, batch_size=256, epochs=1)
    c.model.image_size = 256 if c.model.patch_size == 16 else 252  # a multiple of the patch size
  elif options.size in config.PAPER_SIZES:
    snli_ve.paper(c, options.size, batch_size=128, epochs=10)
  if c.model.pairing == "duplicated":
    # The second layer of a pair starts as a copy of the first.
    c.init.copies = ((r"fusion_encoder/second_(\d+)/(.*)", r"fusion_encoder/layer_\1/\2"),)
  return snli_ve.finish(c, options)


def _data(c: config.Config, options: config.Config) -> None:
  """Sets the fields of one data source."""
  if options.data == "scenes":
    snli_ve.scenes(c, options)
    c.total_steps = 1500
    c.batch_size = 16  # pairs with up to eight statements each: two images cost twice the time
    c.data.max_text = 24
    if options.size == "small":
      c.data.sentences_per_row = 8
    if options.size == "small" and options.init:
      # Twice this rate with half the statements loses relations that were learned by entailment.
      c.optim.lr = 2.5e-4
  elif options.data == "scene_captions":
    snli_ve.scenes(c, options)
    # Captions are longer than statements, and mirroring would exchange first and second.
    c.data.update({"max_text": 40, "mirror": 0.0, "sentences_per_row": 1})
  elif options.data == "nlvr2":
    snli_ve.read_files(c, options, "nlvr_train.json", "nlvr_dev.json", "nlvr_test.json", "")
    c.data.swap = 0.5
  elif options.data == "captions":
    snli_ve.read_files(c, options, "train.json", "val.json", "test.json", "")
    c.data.seed = 0
  else:
    snli_ve.own_data(c, options)
