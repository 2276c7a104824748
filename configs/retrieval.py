r"""Image-text retrieval: contrastive learning and image-text matching, evaluated with re-ranking.

    python -m mplug_jax.main --config=configs/pretrain.py
    python -m mplug_jax.main --config=configs/retrieval.py:init=runs/pretrain

train the small preset on generated scenes of colored shapes (20,000 images with five captions each;
without init= from random initialization) and report recall on 500 test scenes and their 2,500
captions, with the recall of chance and of an oracle, because several scenes match most captions.
`:black_images=true` replaces all images with black ones.

    python -m mplug_jax.main --config.tokenizer.path=vocab.txt \
        --config=configs/retrieval.py:large,data=coco,root=/data/coco,init=FOLDER

is the paper's recipe: 336 px (base: 384), batch 1,024, 8 epochs, queues of 65,536, the best 256
candidates re-ranked, from the weights that tools.convert_checkpoint wrote to FOLDER. It reads the
official JSON files coco_train.json, coco_val.json and coco_test.json under `root` (data=flickr30k:
flickr30k_train.json and so on; others: --config.data.train_files and so on) with image names under
`root`; `tools.prepare_data coco_captions` and `flickr30k` write them. The test split is evaluated
once, at the end; to choose among epochs, set eval.split=val and eval.every. The paper reports R@1
of 82.8 (texts) and 65.8 (images) on COCO's 5,000 test images for large. Hardware: TPU v5e-16 or
similar; on less, raise config.optim.microbatches: a pair is still compared with the whole batch.
Re-ranking keeps the tokens of all texts on every device (25,000 texts: 1.2 GB in bfloat16) and the
fusion encoder's keys and values of eval.batch_size images (10.6 MB each for large), sharded over
the devices.

    python -m mplug_jax.main --config=configs/retrieval.py:data=jsonl,root=/my/data

reads train.jsonl, val.jsonl and test.jsonl under `root`, one line per image: {"image", "caption":
one or a list, optionally "image_id"}. Without test.jsonl, val.jsonl is evaluated. Other formats,
data=jsonl:FILE, other keys, archives, data=folder, data=shards:PATTERN and data=tfds:NAME: see
configs/caption.py.
"""

from mplug_jax import config

SOURCES = ("scenes", "coco", "flickr30k", "jsonl", "folder", "shards", "tfds")


def get_config(arg: str = "") -> config.Config:
  """Returns the config of a retrieval run."""
  options = config.parse_arg(
    arg, SOURCES, data="scenes", root="", init="", res=0, steps=0, black_images=False
  )
  c = config.default_config("retrieval", options.size)
  c.batch_size = 64
  c.task.update(
    {
      "queue": 4096,  # past features, compared with the batch too; 0: batch only, no teacher
      "alpha": 0.4,  # final weight of the teacher's targets
      "ramp_steps": 500,  # updates until alpha is reached; official: the first epoch
      "match": "image",  # or "row": other captions of the same image count as wrong
      "contrast_chunk": 0,  # columns of the similarity matrix computed at a time; 0: all
      "clamp_temperature": True,
      "negatives": {
        "group": 0,  # rows that hard negatives are drawn from; 0: up to 64
        "greedy": False,  # True: the hardest row instead of a draw
        "ramp_steps": 0,  # updates until negatives are fully hard; at first they are any rows
      },
      "rerank_k": 32,  # candidates of every query that are re-ranked; 0: similarity only
      "rerank_texts": 16,  # texts matched with an image at a time
      # Added to the matching logit: "add": the similarity; "likelihood": what the similarity adds
      # after training with hard negatives.
      "rerank_similarity": "none",
    }
  )
  c.ema.update({"decay": 0.995, "use": "teacher"})
  c.data.update(
    {
      "name": options.data,
      "examples": "retrieval",
      "max_words": 30,
      "max_caption": 30,  # tokens, including [CLS]
      "strict": False,
      "black_images": options.black_images,
      "augment": {"scale": (1.0, 1.0), "flip": 0.0, "randaugment": (), "sharpness_wraps": False},
    }
  )
  _data(c, options)
  if options.size in config.PAPER_SIZES:
    _paper(c)
  else:
    _from_scratch(c, options)
  return config.finish(c, options, unused="(text_decoder|fusion_encoder/mlm_head)/.*")


def _data(c: config.Config, options: config.Config) -> None:
  """Sets the fields of one data source."""
  if options.data == "scenes":
    steps = 2500 if options.init else 2000
    records = 64 if options.size == "tiny" else 0
    config.scenes(c, options, steps=steps, records=records, max_caption=28)
    c.eval.limit = 500
    return
  c.total_epochs = 8
  c.tokenizer.vocab_size = 4000  # of a tokenizer fitted to the data
  c.data.augment.scale = (0.5, 1.0)
  if options.data in ("coco", "flickr30k"):
    names = (f"{options.data}_{split}.json" for split in ("train", "val", "test"))
    c.data.update(config.split_files(options.root, *names))
    c.data.image_root = options.root
    c.task.ramp_steps = 553 if options.data == "coco" else 141  # an epoch of batches of 1,024
  else:
    c.data.update(config.own_data(options))
    config.test_or_val(c)
  if options.data == "shards":
    c.tokenizer.records = 20_000


def _from_scratch(c: config.Config, options: config.Config) -> None:
  """Sets training of the sizes tiny and small."""
  config.from_scratch(c, 5e-4 if options.init else 7e-4, 0.1)
  c.task.rerank_similarity = "likelihood"
  if options.size == "tiny":
    c.task.update({"queue": 12, "alpha": 0.4, "ramp_steps": 2, "rerank_k": 6, "rerank_texts": 4})
    return
  # While features change quickly, comparing them with each other works better than with those of a
  # teacher or of past batches.
  c.task.update({"queue": 0, "alpha": 0.0})
  c.ema.decay = 0.0
  # With hard negatives from the start, matching stays at chance.
  c.task.negatives.ramp_steps = 0 if options.init else 1000


def _paper(c: config.Config) -> None:
  """Sets the official learning rates, schedule, batch, augmentation, queues and re-ranking."""
  config.official(
    c, 1024, lr=1e-5, visual_lr=2e-6, epochs=8, warmup_units=1, warmup_lr=1e-5, min_lr=1e-6
  )
  c.task.update({"queue": 65536, "rerank_k": 256})
  c.data.augment.update({"scale": (0.5, 1.0), "flip": 0.5, "randaugment": (2, 7)})
  c.model.remat = "none" if c.model.vision_layers == 12 else "full"
