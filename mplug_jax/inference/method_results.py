"""Results of Predictor's methods as JSON objects for the predict command. No JAX.

Every function takes (predictor, images, texts, options) of a batch of rows, where options are
the parsed command line, and returns one dictionary a row.
"""

from collections.abc import Sequence
from typing import Any

from mplug_jax.inference.results import Match

Row = dict[str, Any]


def answers(predictor: Any, images: Sequence, texts: Sequence, options: Any) -> list[Row]:
  """Returns answer and score."""
  results = predictor.answer(images, texts, truncate=options.truncate)
  return [{"answer": answer.text, "score": answer.score} for answer in results]


def caption_keys(options: Any) -> tuple[str, ...]:
  """Returns the keys of `captions`."""
  return ("caption", "score") if options.n == 1 else ("captions",)


def captions(predictor: Any, images: Sequence, texts: Sequence, options: Any) -> list[Row]:
  """Returns caption and score, or with --n a list of captions."""
  results = predictor.caption(images, prompt=options.prompt, n=options.n)
  if options.n == 1:
    return [{"caption": caption.text, "score": caption.score} for caption in results]
  return [{"captions": [caption._asdict() for caption in row]} for row in results]


def matches(predictor: Any, images: Sequence, texts: Sequence, options: Any) -> list[Row]:
  """Returns similarity and probability: lists for a row with a list of texts."""
  results = predictor.match_pairs(images, texts, truncate=options.truncate)
  return [
    match._asdict()
    if isinstance(match, Match)
    else {name: [getattr(one, name) for one in match] for name in match[0]._fields}
    for match in results
  ]


def boxes(predictor: Any, images: Sequence, texts: Sequence, options: Any) -> list[Row]:
  """Returns box, corners in pixels, and score."""
  results = predictor.locate(images, texts, truncate=options.truncate)
  return [{"box": [box.x0, box.y0, box.x1, box.y1], "score": box.score} for box in results]


def embeddings(predictor: Any, images: Sequence, texts: Sequence, options: Any) -> list[Row]:
  """Returns embedding: of the image if the row has one, else of the text."""
  with_image = [i for i, image in enumerate(images) if image is not None]
  text_only = [i for i, image in enumerate(images) if image is None]
  rows: list[Row] = [{} for _ in images]
  if with_image:
    features = predictor.embed([images[i] for i in with_image])
    for i, feature in zip(with_image, features):
      rows[i] = {"embedding": feature.tolist()}
  if text_only:
    features = predictor.embed(texts=[texts[i] for i in text_only], truncate=options.truncate)
    for i, feature in zip(text_only, features):
      rows[i] = {"embedding": feature.tolist()}
  return rows
