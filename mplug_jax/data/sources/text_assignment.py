"""Text assignment: does a text describe the first of two images, the second, or neither?

Made from images with captions. It prepares a fusion encoder with duplicated layers for statements
about two images, as ALBEF does before NLVR2.
"""

from collections.abc import Sequence

import numpy as np

from mplug_jax.data.sources.source import Record, Source

_TRIES = 20  # draws of another image before one that looks the same is accepted


class TextAssignment:
  """Classification records, one for every captioned image.

  Record i shows image i and another one, in either order. Its text is a caption of the first, of
  the second, or of a third image, with equal probability; the draws depend on (seed, i) alone.
  Images are different if their image_id is.
  """

  def __init__(self, source: Source | Sequence[Record], labels: Sequence[str], seed: int):
    """Makes the source.

    Args:
      source: at least three records {"image", "image_id", "captions": [str, ...]};
        `source.captions(i)`, if it exists, returns the texts of a record without its pixels.
      labels: names of the three classes: first, second, neither.
      seed: of the draws.

    Raises:
      ValueError: there are fewer than three records, or not three labels.
    """
    if len(source) < 3:
      raise ValueError(
        f"Text assignment needs at least three captioned images, and the data has {len(source)}."
      )
    if len(labels) != 3:
      raise ValueError(
        f"config.data.labels={tuple(labels)!r} must be three for text assignment: first, second, "
        "neither."
      )
    self._source = source
    self._labels = labels
    self._seed = seed

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Record:
    case, other, _, _ = self._draw(index)
    images = [self._source[i]["image"] for i in (index, other)]
    return {"images": images[::-1] if case == 1 else images, **self.row(index)}

  def row(self, index: int) -> Record:
    """Returns a record without its images."""
    case, _, third, rng = self._draw(index)
    captions = self._captions(third if case == 2 else index)
    return {
      "id": index,
      "sentence": captions[int(rng.integers(len(captions)))],
      "label": self._labels[case],
    }

  def groups(self, index: int) -> tuple[str, ...]:
    """Returns no subsets."""
    return ()

  def _captions(self, index: int) -> list[str]:
    captions = getattr(self._source, "captions", None)
    return captions(index) if captions else self._source[index]["captions"]

  def _draw(self, index: int) -> tuple[int, int, int, np.random.Generator]:
    """Returns (class, another record, a third record, the generator for the remaining draws)."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} is not among the {len(self)}")
    rng = np.random.default_rng((self._seed, index))
    case = int(rng.integers(3))
    other = self._another(rng, (index,))
    return case, other, self._another(rng, (index, other)), rng

  def _another(self, rng: np.random.Generator, taken: Sequence[int]) -> int:
    """Draws a record not in `taken` and, if soon found, with another image than theirs."""
    drawn = -1
    for _ in range(_TRIES):
      drawn = int(rng.integers(len(self) - len(taken)))
      for number in sorted(taken):
        if drawn >= number:
          drawn += 1
      if all(self._image_id(drawn) != self._image_id(number) for number in taken):
        break
    return drawn

  def _image_id(self, index: int) -> object:
    """Returns what identifies the image of a record; generated images are all different."""
    return index if hasattr(self._source, "captions") else self._source[index]["image_id"]
