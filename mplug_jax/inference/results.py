"""Results of Predictor's methods: plain Python, no JAX."""

from typing import Any, NamedTuple

import numpy as np


class Answer(NamedTuple):
  """An answer to a question.

  Attributes:
    text: the answer.
    score: log-probability divided by beam search's length penalty; the probability among
      `candidates` if these are given.
  """

  text: str
  score: float


class Caption(NamedTuple):
  """A caption of an image.

  Attributes:
    text: the caption, without the prompt.
    score: log-probability divided by beam search's length penalty.
  """

  text: str
  score: float


class Match(NamedTuple):
  """Scores of images and texts: numbers for one image and one text, else lists.

  Attributes:
    similarity: cosine similarity of the contrastive features, -1 to 1.
    probability: that the text describes the image, from the model that reads both.
  """

  similarity: float | list
  probability: float | list


class Hit(NamedTuple):
  """A search result.

  Attributes:
    number: position of the image in the list given to `index`.
    image: the image as given to `index`.
    score: what the results are sorted by.
    similarity: cosine similarity of the contrastive features, -1 to 1.
  """

  number: int
  image: Any
  score: float
  similarity: float


class Box(NamedTuple):
  """Corners in pixels of the upright image, ends exclusive. score: log-probability."""

  x0: float
  y0: float
  x1: float
  y1: float
  score: float


class Label(NamedTuple):
  """A class, its probability, and {class: probability} of all."""

  label: str
  score: float
  scores: dict[str, float]


class Index(NamedTuple):
  """Images that `search` looks through.

  Attributes:
    images: the images as given.
    features: unit vectors, f32[N, E].
    tokens: N arrays [T, D] in host memory; None: results are not re-ranked.
  """

  images: list
  features: np.ndarray
  tokens: list | None
