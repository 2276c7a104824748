"""Images with captions -> examples for pre-training: as for retrieval, with the caption masked, and split into a prefix and the rest.

Sources: those of retrieval.py. With several train_files each file, or pattern of shards, is a
source of a mixture, in the proportions of data.weights.
"""

import functools

import numpy as np

from mplug_jax.data.examples import retrieval
from mplug_jax.data.images import reader
from mplug_jax.data.sources.mixture import Mixture
from mplug_jax.data.storage import annotations
from mplug_jax.data.text import cleaning
from mplug_jax.data.text.masking import mask_tokens
from mplug_jax.data.text.tokenizer import pad_ids

_CACHED_WORDS = 1 << 17


def get_source(data, split):
  """Pairs of an image and a caption; errors as of retrieval.get_images, and of Mixture."""
  if split != "train" or not data.get("train_files"):
    return retrieval.get_source(data, split)
  sources = []
  for file in annotations.split_names(data, split):
    one = data.copy_and_resolve_references().unlock()
    one.train_files = (file,)
    sources.append(retrieval.get_source(one, split))
  return Mixture(sources, data.weights or None)


def texts(source, records=0):
  """See `retrieval.texts`; of every source of a mixture."""
  for part in source.sources if isinstance(source, Mixture) else [source]:
    yield from retrieval.texts(part, records)


class PretrainTransform(retrieval.PairTransform):
  """A transform for `pipeline`.

  Its examples have, beside those of PairTransform (L tokens, T = L + 1):

    masked i32[L]: the caption with some tokens hidden; masked_label i32[L]: those tokens, the pad
    id elsewhere; prefix i32[L]: [bos] and the first words; target i32[T]: [bos], the other words,
    at least one, [eos].

  Args:
    images: an ImageReader. tokenizer: see tokenizer.py.
    max_words, max_caption: see CaptionRows; L = max_caption.
    mask_probability, whole_words: see masking.py.
    empty_prefix: share of examples whose prefix is [bos] alone, beside those that draw it: all cuts
      before a word are equally likely.
  """

  def __init__(
    self, images, tokenizer, *, max_words, max_caption, mask_probability, whole_words, empty_prefix
  ):
    super().__init__(images, retrieval.CaptionRows(tokenizer, max_words, max_caption))
    self._tokenizer, self._max_words, self._length = tokenizer, max_words, max_caption
    self._mask = dict(
      probability=mask_probability,
      whole_words=whole_words,
      vocab_size=tokenizer.vocab_size,
      mask_id=tokenizer.mask_id,
      pad_id=tokenizer.pad_id,
    )
    self._empty_prefix = empty_prefix
    self._make_cache()

  def _make_cache(self):
    self._pieces = functools.lru_cache(_CACHED_WORDS)(self._encode)

  def _encode(self, word):
    """Ids of a word's pieces."""
    return tuple(self._tokenizer.encode(word)[1:])

  def __getstate__(self):
    """Without the cache, which cannot be sent to a worker process."""
    return {key: value for key, value in self.__dict__.items() if key != "_pieces"}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._make_cache()

  def __call__(self, index, record, rng):
    """Rng None, in evaluation: draws that depend on the index alone, no augmentation."""
    example = super().__call__(index, record, rng)
    rng = np.random.default_rng(index) if rng is None else rng
    words = [
      self._pieces(word)
      for word in cleaning.pre_caption(record["caption"], self._max_words).split(" ")
    ]
    numbers = [-1, *(n for n, word in enumerate(words) for _ in word)][: self._length]
    numbers = np.array(numbers + [-1] * (self._length - len(numbers)))
    masked, label = mask_tokens(example["caption"], numbers, rng, **self._mask)
    cut = (
      0
      if self._empty_prefix and rng.random() < self._empty_prefix
      else int(rng.integers(len(words)))
    )
    return example | {
      "masked": masked,
      "masked_label": label,
      "prefix": self._row(words[:cut], self._length),
      "target": self._row(words[cut:], self._length + 1, self._tokenizer.eos_id),
    }

  def _row(self, words, length, eos_id=None):
    """Words -> i32[length]: [bos] and their pieces, ended by eos_id if it is given."""
    ids = [self._tokenizer.bos_id, *(piece for word in words for piece in word)]
    return pad_ids([ids], length, self._tokenizer.pad_id, truncate=True, ensure_eos=eos_id)[0]


def make_transform(config, tokenizer, train):
  """The transform that config.data and config.model describe: for training.

  Evaluation is that of retrieval.
  """
  if not train:
    return retrieval.make_transform(config, tokenizer, train)
  fields = ("max_words", "max_caption", "mask_probability", "whole_words", "empty_prefix")
  return PretrainTransform(
    reader.reader(config), tokenizer, **{name: config.data[name] for name in fields}
  )
