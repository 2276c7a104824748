"""What the methods of Predictor give: plain Python, no JAX."""

from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
  """score: log-probability, divided by the length penalty of decode.beam_search; the probability among `candidates` if these are given."""

  text: str
  score: float


class Caption(NamedTuple):
  """score: as of Answer."""

  text: str
  score: float


class Match(NamedTuple):
  """similarity: of the features, -1 to 1. probability: that the text describes the image, of a model that reads both. Numbers for one image
  and one text; lists, a row for each image, where there are several."""

  similarity: float | list
  probability: float | list


class Hit(NamedTuple):
  """A found image: its number and itself as they were given to `index`; `score` decides the order; similarity as of Match."""

  number: int
  image: object
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
  scores: dict


class Index(NamedTuple):
  """Images to search in. features: f32[N, E]. tokens: [N] of dtype[T, D] in the host's memory, or None: not to be re-ranked."""

  images: list
  features: np.ndarray
  tokens: list | None
