"""Records and tokenizer of the grounding tests."""

import numpy as np

from mplug_jax.data.examples import grounding
from tests.support.grounding_files import painted

# Unlike BERT's, to catch numbers written into the code
PAD = 9


BOS = 7


EOS = 8


AUGMENT = dict(
  long_sides=(1.0,),
  crop=0.0,
  official_crop=False,
  jitter=0.0,
  flip=0.0,
  position_words=(),
  official_words=False,
)


class WordTokenizer:
  """One token per word; ids from 100 in order of appearance."""

  pad_id = PAD
  bos_id = BOS
  eos_id = EOS

  def __init__(self):
    self.words = {}

  def encode(self, text):
    return [BOS, *(100 + self.words.setdefault(word, len(self.words)) for word in text.split())]


def transform(tokenizer=None, strict=False, **options):
  images = grounding.WholeImages(32, strict=strict)
  return grounding.GroundingTransform(
    tokenizer or WordTokenizer(),
    images,
    **{
      "size": 32,
      "expressions_per_image": 2,
      "max_phrase": 6,
      "train": True,
      "augment": AUGMENT,
      "strict": strict,
      **options,
    },
  )


def expression(text="the red one", box=(10.0, 10.0, 30.0, 30.0), number="1"):
  return {"id": number, "text": text, "box": box}


def record(*expressions, image=None):
  image = painted(40, 60, red=(10, 10, 30, 30)) if image is None else image
  return {"image": image, "image_id": "picture-1", "expressions": list(expressions)}


def rng(seed=0):
  return np.random.default_rng(seed)
