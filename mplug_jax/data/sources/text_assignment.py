"""Text assignment: which of two images does a text describe, the first, the second or neither? Made from images with captions.

It prepares a fusion encoder with duplicated layers for statements about two images, as ALBEF does
before NLVR2.
"""

import numpy as np

_TRIES = 20  # draws of another image before one that looks the same is accepted


class TextAssignment:
  """Records of data/classification.py, one for every captioned image.

  Record i shows image i and another one, in either order. Its text is a caption of the first, of
  the second, or of a third image, with equal probability; the draws depend on (seed, i) alone.
  Different images are told by their image_id.

  Args:
    source: records {"image", "image_id", "captions": [str, ...]}, at least three;
      `source.captions(i)`, if there is one, gives the texts of a record without its pixels.
    labels: names of the three classes: first, second, neither.

  Raises:
    ValueError: fewer than three records, or not three labels.
  """

  def __init__(self, source, labels, seed):
    if len(source) < 3:
      raise ValueError(
        f"Text assignment needs at least three captioned images, and the data has {len(source)}."
      )
    if len(labels) != 3:
      raise ValueError(
        f"config.data.labels={tuple(labels)!r} must be three for text assignment: first, second, "
        f"neither."
      )
    self._source, self._labels, self._seed = source, labels, seed

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    case, own, other, _, _ = self._draw(index)
    images = [self._source[i]["image"] for i in (own, other)]
    return {"images": images[::-1] if case == 1 else images, **self.row(index)}

  def row(self, index):
    """A record without its images."""
    case, own, _, third, rng = self._draw(index)
    captions = self._captions(third if case == 2 else own)
    return {
      "id": index,
      "sentence": captions[int(rng.integers(len(captions)))],
      "label": self._labels[case],
    }

  def groups(self, index):
    """There are no subsets."""
    del index
    return ()

  def _captions(self, index):
    return (
      self._source.captions(index)
      if hasattr(self._source, "captions")
      else self._source[index]["captions"]
    )

  def _draw(self, index):
    """-> (class number, record of the caption's image, another record, a third, the generator for what is left to draw)."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} is not among the {len(self)}")
    rng = np.random.default_rng((self._seed, index))
    case = int(rng.integers(3))
    other = self._another(rng, (index,))
    return case, index, other, self._another(rng, (index, other)), rng

  def _another(self, rng, taken):
    """Number of a record that is none of `taken` and, if one is soon found, of an image other than theirs."""
    for _ in range(_TRIES):
      found = int(rng.integers(len(self) - len(taken)))
      for number in sorted(taken):
        found += found >= number
      if all(self._image_id(found) != self._image_id(number) for number in taken):
        break
    return found

  def _image_id(self, index):
    """Of generated images every record has its own."""
    return index if hasattr(self._source, "captions") else self._source[index]["image_id"]
