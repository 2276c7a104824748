"""Predictor: answers, captions, matches, boxes and classes of images and texts.

Images are paths, encoded bytes, PIL images or arrays u8[H, W], [H, W, 3 | 4]. Clips are paths of
video files, arrays u8[T, H, W, 3] or `Clip(frames)`. One image gives one result, a list of images
a list of results. Results do not depend on the other inputs of a call.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mplug_jax.data import boxes
from mplug_jax.data.examples import caption as caption_data
from mplug_jax.inference import arguments, inputs, programs
from mplug_jax.inference.engine import Engine
from mplug_jax.inference.results import Answer, Box, Caption, Hit, Index, Label, Match

_PROMPT_WIDTHS = 8  # prompts are padded to a multiple of it


class Predictor(Engine):
  """A checkpoint in use; `Predictor.load(folder)` loads one.

  Attributes and arguments of `load`: see Engine.
  """

  # ---- questions and captions

  def answer(
    self,
    images: Any,
    questions: Any,
    *,
    candidates: Sequence[str] | None = None,
    truncate: bool = False,
  ) -> Any:
    """Answers questions.

    Args:
      images: one or many.
      questions: one, or a list: all about one image, or for many images one question, or a list
        of questions, for each.
      candidates: answers to choose from; default: answers are generated, or chosen if
        config.task.predict is "rank".
      truncate: cut questions that are too long, with a warning, instead of raising.

    Returns:
      Answer, or (nested) list of them, one for each question.
    """
    changes = (
      {}
      if candidates is None
      else {"predict": "rank", "rank_answers": arguments.candidate_answers(candidates)}
    )
    task = self.task("answer", **changes)
    rank = task.config.task.predict == "rank"
    images, questions, requests, shape = inputs.pairs(images, questions, "question")
    batch = {"question": self.text_rows("answer")(questions, truncate)[:, None]}
    out = self._ask("answer", "rank" if rank else "generate", images, requests, batch, **changes)
    if rank:
      return shape(
        [
          Answer(task.answers[answers[0, 0]], float(scores[0, 0]))
          for answers, scores in zip(out["answer"], out["probability"])
        ]
      )
    return shape(
      [
        Answer(self.tokenizer.decode(tokens[0, : length[0]]), float(score[0]))
        for tokens, length, score in zip(out["tokens"], out["length"], out["score"])
      ]
    )

  def caption(self, images: Any, *, prompt: str | None = None, n: int = 1) -> Any:
    """Captions images.

    Args:
      images: one or many.
      prompt: beginning of every caption, not part of the returned text; default:
        config.task.prompt.
      n: captions of each image, best first.

    Returns:
      Caption, or with n > 1 a list of n; for many images a list of these.
    """
    if n < 1:
      raise ValueError(f"n={n} must be at least 1 caption.")
    task = self.task("caption")
    parsed = task.prompt if prompt is None else self._prompt(task, prompt)
    length = len(parsed.start)
    width = length if prompt is None else -(-length // _PROMPT_WIDTHS) * _PROMPT_WIDTHS
    start = np.array([*parsed.start, *[self.tokenizer.pad_id] * (width - length)], np.int32)
    listed = inputs.as_list(images)
    batch = {
      "prompt": np.tile(start, (len(listed), 1)),
      "prompt_length": np.full(len(listed), length, np.int32),
    }
    out = self._ask("caption", n, listed, [(i,) for i in range(len(listed))], batch)
    captions: list[Any] = [
      self._captions(parsed.decoded, *beams)
      for beams in zip(out["tokens"], out["length"], out["score"])
    ]
    if n == 1:
      captions = [beams[0] if beams else Caption("", -math.inf) for beams in captions]
    return captions[0] if inputs.is_one(images) else captions

  def _captions(
    self, prompt: str, tokens: np.ndarray, lengths: np.ndarray, scores: np.ndarray
  ) -> list[Caption]:
    """Returns the captions of an image, without the prompt and beams that found none."""
    return [
      Caption(self.tokenizer.decode(ids[:length]).removeprefix(prompt).strip(), float(score))
      for ids, length, score in zip(tokens, lengths, scores)
      if score != -np.inf
    ]

  def _prompt(self, task: Any, text: str) -> caption_data.Prompt:
    """Returns the Prompt of a text. Raises ValueError: no room for a caption after it."""
    config = task.config.copy_and_resolve_references()
    config.task.prompt = text
    return caption_data.prompt(config, self.tokenizer)

  # ---- images and texts compared

  def embed(self, images: Any = None, texts: Any = None, *, truncate: bool = False) -> np.ndarray:
    """Embeds images or texts as unit vectors, whose dot products are similarities.

    Args:
      images: one or many.
      texts: one or many, instead of images.
      truncate: cut texts that are too long, with a warning, instead of raising.

    Returns:
      f32[E] of one, f32[N, E] of many.
    """
    if (images is None) == (texts is None):
      raise ValueError("embed takes either images= or texts=.")
    if texts is not None:
      task = self.task("embed")
      batch = {"caption": self.text_rows("embed")(arguments.text_list(texts), truncate)}
      make = functools.partial(programs.make_text_features, task)
      feature = self._programs.rows("embed_texts", make, batch)["feature"]
      return feature[0] if isinstance(texts, str) else feature
    feature = np.stack(self._features(inputs.as_list(images))["feature"])
    return feature[0] if inputs.is_one(images) else feature

  def match(self, images: Any, texts: Any, *, truncate: bool = False) -> Match:
    """Compares every image with every text.

    Args:
      images: one or many.
      texts: one or many.
      truncate: cut texts that are too long, with a warning, instead of raising.

    Returns:
      Match, whose fields are numbers, lists, or lists of lists [image][text].
    """
    listed = inputs.as_list(images)
    many = arguments.text_list(texts)
    captions = self.text_rows("match")(many, truncate)
    requests = [(i,) for i in range(len(listed)) for _ in many]
    batch = {"caption": np.tile(captions, (len(listed), 1))}
    out = self._ask("match", "match", listed, requests, batch)

    def matrix(values: Any) -> Any:
      rows = np.reshape(values, (len(listed), len(many))).tolist()
      rows = [row[0] for row in rows] if isinstance(texts, str) else rows
      return rows[0] if inputs.is_one(images) else rows

    return Match(matrix(out["similarity"]), matrix(out["probability"]))

  def match_pairs(self, images: Any, texts: Any, *, truncate: bool = False) -> Any:
    """Compares each image with its texts.

    Args:
      images: one or many.
      texts: as the questions of `answer`.
      truncate: cut texts that are too long, with a warning, instead of raising.

    Returns:
      Match, or (nested) list of them, one for each text.
    """
    images, texts, requests, shape = inputs.pairs(images, texts, "text")
    batch = {"caption": self.text_rows("match")(texts, truncate)}
    out = self._ask("match", "match", images, requests, batch)
    return shape([Match(float(s), float(p)) for s, p in zip(out["similarity"], out["probability"])])

  def index(self, images: Any, *, rerank: bool = True) -> Index:
    """Indexes images for `search`.

    Args:
      images: one or many.
      rerank: keep the image tokens in memory (f32[577, 768] per image at base size, 1.8 MB), so
        that `search` ranks the best images again with the fusion encoder, if there is one.

    Returns:
      Index.
    """
    images = inputs.as_list(images)
    out = self._features(images, tokens=rerank and self.can("match"))
    return Index(images, np.stack(out["feature"]), out.get("tokens"))

  def search(
    self, query: Any, index: Index, *, k: int = 10, candidates: int = 32, truncate: bool = False
  ) -> list[Hit]:
    """Searches an index of images.

    Args:
      query: a text (str), or an image that is no str: a pathlib.Path, bytes, ...
      index: returned by `index`.
      k: maximum results.
      candidates: number of most similar images that are ranked again with the fusion encoder, for
        a text as query and an index with image tokens.
      truncate: cut a text that is too long, with a warning, instead of raising.

    Returns:
      Hits, best first.
    """
    if not isinstance(query, str):
      feature = self.embed(query)
    else:
      feature = self.embed(texts=query, truncate=truncate)
    similarity = index.features @ feature
    best = np.argsort(-similarity, kind="stable")
    scores = similarity
    if isinstance(query, str) and index.tokens is not None:
      task = self.task("match")
      chosen = best[: max(k, candidates)]
      caption = self.text_rows("match")([query], truncate)
      rows = {
        "image": np.stack([index.tokens[i] for i in chosen]),
        "caption": np.repeat(caption, len(chosen), axis=0),
      }
      scores = similarity.copy()
      scores[chosen] = self._programs.rows("search", lambda: task.match_pairs, rows)["score"]
      best = chosen[np.argsort(-scores[chosen], kind="stable")]
    return [Hit(int(i), index.images[i], float(scores[i]), float(similarity[i])) for i in best[:k]]

  def _features(self, images: Sequence[Any], tokens: bool = False) -> dict[str, list]:
    """Returns {"feature": N of f32[E]}, and with `tokens` {"tokens": N of dtype[T, D]}."""
    self.task("embed")
    requests = [(i,) for i in range(len(images))]
    return self._ask("embed", "tokens" if tokens else "features", images, requests, {})

  # ---- boxes and classes

  def locate(self, images: Any, phrases: Any, *, truncate: bool = False) -> Any:
    """Locates what phrases describe.

    Args:
      images: one or many; no clips.
      phrases: as the questions of `answer`.
      truncate: cut phrases that are too long, with a warning, instead of raising.

    Returns:
      Box in pixels of the image, cut at its edges, or (nested) list of them, one for each phrase.
    """
    images, phrases, requests, shape = inputs.pairs(images, phrases, "phrase")
    arguments.refuse_clips(images, "locate")
    batch = {
      "phrase": self.text_rows("locate")(phrases, truncate)[:, None],
      "box": np.zeros((len(phrases), 1, 4), np.float32),
    }
    out = self._ask("locate", "locate", images, requests, batch)
    return shape(
      [
        Box(*map(float, boxes.cut(box[0], size)), score=float(score[0]))
        for box, size, score in zip(out["box"], out["size"], out["score"])
      ]
    )

  def entails(self, images: Any, statements: Any, *, truncate: bool = False) -> Any:
    """Classifies statements about an image.

    Args:
      images: one or many; no clips.
      statements: as the questions of `answer`.
      truncate: cut statements that are too long, with a warning, instead of raising.

    Returns:
      Label, or (nested) list of them, one for each statement.
    """
    images, statements, requests, shape = inputs.pairs(images, statements, "statement")
    return shape(self._classify("entails", images, requests, statements, truncate))

  def compare(self, pairs: Any, statements: Any, *, truncate: bool = False) -> Any:
    """Classifies statements about two images.

    Args:
      pairs: (first, second) or a list of pairs; no clips.
      statements: one, or a list: all about one pair, or for many pairs one statement, or a list
        of statements, for each.
      truncate: cut statements that are too long, with a warning, instead of raising.

    Returns:
      Label, or (nested) list of them, one for each statement.
    """
    images, statements, requests, shape = inputs.pairs_of_images(pairs, statements)
    return shape(self._classify("compare", images, requests, statements, truncate))

  def _classify(
    self,
    method: str,
    images: Sequence[Any],
    requests: Sequence[tuple[int, ...]],
    statements: Sequence[str],
    truncate: bool,
  ) -> list[Label]:
    arguments.refuse_clips(images, method)
    batch = {
      "sentence": self.text_rows(method)(statements, truncate)[:, None],
      "label": np.full((len(statements), 1), -1, np.int32),
    }
    out = self._ask(method, "classify", images, requests, batch)
    labels = []
    for probabilities in out["probability"]:
      scores = dict(zip(self.config.data.labels, probabilities.tolist()))
      label = max(scores, key=scores.__getitem__)
      labels.append(Label(label, scores[label], scores))
    return labels
