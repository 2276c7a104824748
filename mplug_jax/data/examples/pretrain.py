"""Images with captions -> examples for pre-training.

They are those of retrieval, and the caption again masked, and again split into a prefix and the
rest. The sources are those of retrieval.py. With several train_files each file, or pattern of
shards, is a source of a mixture, in the proportions of data.weights.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from mplug_jax.config import Config
from mplug_jax.data.examples import retrieval
from mplug_jax.data.images import reader
from mplug_jax.data.sources.mixture import Mixture
from mplug_jax.data.storage import annotations
from mplug_jax.data.text import cleaning
from mplug_jax.data.text.masking import mask_tokens
from mplug_jax.data.text.tokenizer import pad_ids
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.data.types import Example, Record, Source

VIEW = retrieval.VIEW

_CACHED_WORDS = 1 << 17


def get_source(data: Config, split: str) -> Source:
  """Returns pairs of an image and a caption; of "train", a mixture of the training files.

  Args:
    data: config.data.
    split: "train", "val" or "test".

  Raises:
    ValueError: as retrieval.get_images, or as Mixture.
    FileNotFoundError: as retrieval.get_images.
  """
  if split != "train" or not data.get("train_files"):
    return retrieval.get_source(data, split)
  sources = []
  for file in annotations.split_names(data, split):
    data_of_file = data.copy_and_resolve_references().unlock()
    data_of_file.train_files = (file,)
    sources.append(retrieval.get_source(data_of_file, split))
  return Mixture(sources, data.weights or None)


def texts(source: Any, records: int = 0) -> Iterator[str]:
  """Yields captions.

  Args:
    source: a `Pairs`, or a mixture of them.
    records: number of images of each source, evenly spaced; 0 = all.
  """
  for part in source.sources if isinstance(source, Mixture) else [source]:
    yield from retrieval.texts(part, records)


class PretrainTransform(retrieval.PairTransform):
  """Transform for `pipeline`: called with (index, record, rng), it returns an example.

  An example has the keys of PairTransform and (L tokens, T = L + 1) masked i32[L], the caption with
  some tokens hidden; masked_label i32[L], those tokens, the pad id elsewhere; prefix i32[L], [bos]
  and the first words; target i32[T], [bos], the other words, at least one, [eos].
  """

  def __init__(
    self,
    images: reader.ImageReader,
    tokenizer: Tokenizer,
    *,
    max_words: int,
    max_caption: int,
    mask_probability: float,
    whole_words: bool,
    empty_prefix: float,
  ):
    """Makes the transform.

    Args:
      images: reads the images.
      tokenizer: tokenizer of the run.
      max_words: words of a caption.
      max_caption: L, tokens of a caption.
      mask_probability: see masking.py.
      whole_words: see masking.py.
      empty_prefix: share of examples whose prefix is set to [bos] alone; in the others all cuts
        before a word are equally likely.
    """
    super().__init__(images, retrieval.CaptionRows(tokenizer, max_words, max_caption))
    self._tokenizer = tokenizer
    self._max_words = max_words
    self._length = max_caption
    self._mask_probability = mask_probability
    self._whole_words = whole_words
    self._empty_prefix = empty_prefix
    self._make_cache()

  def _make_cache(self):
    self._pieces = functools.lru_cache(_CACHED_WORDS)(self._encode)

  def _encode(self, word):
    """Ids of a word's pieces."""
    return tuple(self._tokenizer.encode(word)[1:])

  def __getstate__(self) -> dict[str, Any]:
    """Without the cache, which cannot be sent to a worker process."""
    return {key: value for key, value in self.__dict__.items() if key != "_pieces"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._make_cache()

  def __call__(self, index: int, record: Record, rng: np.random.Generator | None) -> Example:
    """Makes an example; without a generator the draws depend on the index alone."""
    example = super().__call__(index, record, rng)
    rng = np.random.default_rng(index) if rng is None else rng
    words = [
      self._pieces(word)
      for word in cleaning.pre_caption(record["caption"], self._max_words).split(" ")
    ]
    numbers = [-1, *(n for n, word in enumerate(words) for _ in word)][: self._length]
    numbers = np.array(numbers + [-1] * (self._length - len(numbers)))
    masked, label = mask_tokens(
      example["caption"],
      numbers,
      rng,
      probability=self._mask_probability,
      whole_words=self._whole_words,
      vocab_size=self._tokenizer.vocab_size,
      mask_id=self._tokenizer.mask_id,
      pad_id=self._tokenizer.pad_id,
    )
    empty = self._empty_prefix and rng.random() < self._empty_prefix
    cut = 0 if empty else int(rng.integers(len(words)))
    return example | {
      "masked": masked,
      "masked_label": label,
      "prefix": self._row(words[:cut], self._length),
      "target": self._row(words[cut:], self._length + 1, self._tokenizer.eos_id),
    }

  def _row(self, words, length, eos_id=None):
    """Words -> i32[length]: [bos] and their pieces, then eos_id if it is given."""
    ids = [self._tokenizer.bos_id, *(piece for word in words for piece in word)]
    return pad_ids([ids], length, self._tokenizer.pad_id, truncate=True, ensure_eos=eos_id)[0]


def make_transform(config: Config, tokenizer: Tokenizer, train: bool) -> retrieval.PairTransform:
  """Returns the transform that config.data and config.model describe.

  Args:
    config: config of the run.
    tokenizer: tokenizer of the run.
    train: returns the transform for training; otherwise that of retrieval.
  """
  if not train:
    return retrieval.make_transform(config, tokenizer, train)
  data = config.data
  return PretrainTransform(
    reader.reader(config),
    tokenizer,
    max_words=data.max_words,
    max_caption=data.max_caption,
    mask_probability=data.mask_probability,
    whole_words=data.whole_words,
    empty_prefix=data.empty_prefix,
  )
