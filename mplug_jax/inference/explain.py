"""Attention maps of a Predictor's results: answers, captions, matches, classes and boxes.

    explainer = Explainer(Predictor.load("runs/vqa"))
    explainer.answer("dog.jpg", "what is it chasing?").save("maps.png")

attention_maps.py describes the two kinds of maps, "gradient" and "attention".
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mplug_jax.data import boxes
from mplug_jax.data.images import ops
from mplug_jax.inference import attention_maps, inputs
from mplug_jax.inference.results import Answer, Box, Label, Match
from mplug_jax.reporting import overlay as overlay_lib
from mplug_jax.reporting import sample_sheet

MAPS = ("gradient", "attention")
_WIDTH = 8  # answers and captions are padded to a multiple of it


class Word(NamedTuple):
  """A word, or another part of a result with a score.

  Attributes:
    text: the word.
    score: its log-probability; of a match, the log-odds.
    gradient: f32[F, G, G], a grid over each of F images, not negative.
    attention: f32[F, G, G], a grid over each of F images, not negative.
  """

  text: str
  score: float
  gradient: np.ndarray
  attention: np.ndarray


class Explanation(NamedTuple):
  """A result with its attention maps.

  Attributes:
    result: returned by the Predictor's method.
    asked: the question, phrase or statement.
    images: F arrays u8[H, W, 3], upright.
    words: of the result.
    boxes: on the first image, corners in pixels.
  """

  result: Any
  asked: str
  images: list
  words: list
  boxes: tuple = ()

  def map(self, kind: str = "gradient", word: int | None = None) -> np.ndarray:
    """Returns a map, f32[F, G, G].

    Args:
      kind: one of MAPS.
      word: number of a word; None: the sum over all words.

    Raises:
      ValueError: unknown kind.
    """
    if kind not in MAPS:
      raise ValueError(f"{kind!r} is not a map; there are {', '.join(MAPS)}.")
    words = self.words if word is None else [self.words[word]]
    return functools.reduce(np.add, [getattr(one, kind) for one in words])

  def picture(self, image: int = 0) -> np.ndarray:
    """Returns an image with the boxes, u8[H', W', 3], see reporting.overlay."""
    return overlay_lib.overlay(self.images[image], None, self.boxes if image == 0 else ())

  def overlay(self, kind: str = "gradient", word: int | None = None, image: int = 0) -> np.ndarray:
    """Returns an image with a map and the boxes, u8[H', W', 3], see `map` and reporting.overlay."""
    return overlay_lib.overlay(
      self.images[image], self.map(kind, word)[image], self.boxes if image == 0 else ()
    )

  def save(self, path: str | os.PathLike, kind: str = "gradient") -> None:
    """Writes a PNG with the images, the sum of the maps, and the maps of several words."""
    text = _text_of(self.result)
    numbers = range(len(self.images))
    cells = [(self.picture(i), sample_sheet.Sample(self.asked, text, "", "open")) for i in numbers]
    cells += [
      (self.overlay(kind, None, i), sample_sheet.Sample("attention map", text, "", "open"))
      for i in numbers
    ]
    if len(self.words) > 1:
      cells += [
        (
          self.overlay(kind, n, i),
          sample_sheet.Sample("", f"{word.text} ({np.exp(word.score):.2f})", "", "open"),
        )
        for n, word in enumerate(self.words)
        for i in numbers
      ]
    sample_sheet.sample_sheet(
      [image for image, _ in cells], [[sample] for _, sample in cells], path
    )


def _text_of(result: Any) -> str:
  """Returns a result as text."""
  if isinstance(result, Label):
    return f"{result.label} ({result.score:.2f})"
  if isinstance(result, Match):
    return f"match {result.probability:.2f}"
  if isinstance(result, Box):
    return f"box {', '.join(f'{x:.0f}' for x in result[:4])}"
  return result.text


class Explainer:
  """Explains a Predictor's results for one image or clip at a time.

  Arguments and errors are those of the Predictor's methods.
  """

  def __init__(self, predictor: Any):
    """Explains a Predictor."""
    self._predictor = predictor
    self._look: Callable[..., Any] = functools.lru_cache(None)(self._make_look)

  def _make_look(self, method: str, frames: int, **changes: Any) -> Callable:
    """Returns a jitted function (params, batch), which returns Looked and outputs of `locate`."""
    task = self._predictor.task(method, frames, **changes)

    def look(params: Any, batch: dict) -> tuple:
      located = {}
      if method == "locate":
        located = task.predict_fns()["locate"](params, batch | {"box": jnp.zeros((1, 1, 4))})
        batch = batch | {
          "bins": located["bins"],
          "box": attention_maps.box_of_bins(located["bins"], task.config.task.bins),
        }
      return attention_maps.look(task, params, batch), located

    return jax.jit(look)

  def _run(self, method: str, frames: int, batch: dict, **changes: Any) -> tuple[Any, Any]:
    """Returns the Looked of a batch of one row, and the outputs of `locate`."""
    with jax.set_mesh(self._predictor.mesh):
      looked, located = self._look(method, frames, **changes)(self._predictor.params, batch)
    return jax.tree.map(lambda x: np.asarray(x[0]), looked), located

  def _images(self, method: str, images: Sequence[Any]) -> tuple[dict, int, list]:
    """Returns Predictor.image_rows, the number of frames, and the images to show."""
    rows = self._predictor.image_rows(method, images)
    if inputs.is_clip(images[0]):
      return rows, rows["image"].shape[1], list(rows["image"][0])
    return rows, 0, [ops.decode_image(image) for image in images]

  # ---- results with words

  def answer(
    self, image: Any, question: str, answer: str | None = None, *, truncate: bool = False
  ) -> Explanation:
    """Explains every word of an answer.

    Args:
      image: an image or clip.
      question: about it.
      answer: explained instead of the Predictor's answer.
      truncate: see Predictor.answer.

    Returns:
      Explanation.
    """
    result = (
      self._predictor.answer(image, question, truncate=truncate)
      if answer is None
      else Answer(answer, float("nan"))
    )
    rows, frames, shown = self._images("answer", [image])
    asked = self._predictor.text_rows("answer")([question], truncate)
    ids = self._ids(result.text)
    looked, _ = self._run(
      "answer",
      frames,
      rows | {"question": asked[:, None], "answer": self._padded(ids)[None, None, None]},
    )
    return Explanation(result, question, shown, self._words(ids, looked, 1))

  def caption(self, image: Any, *, prompt: str | None = None) -> Explanation:
    """Explains every word of a caption after the prompt."""
    result = self._predictor.caption(image, prompt=prompt)
    rows, frames, shown = self._images("caption", [image])
    changes = {} if prompt is None else {"prompt": prompt}
    task = self._predictor.task("caption", frames, **changes)
    ids = self._ids(task.prompt.text + result.text)
    batch = {"caption": self._padded(ids)[None, None], "caption_valid": np.ones((1, 1), bool)}
    looked, _ = self._run("caption", frames, rows | batch, **changes)
    return Explanation(result, prompt or "", shown, self._words(ids, looked, len(task.prompt.ids)))

  def _ids(self, text: str) -> list[int]:
    """Returns [bos] pieces [eos]."""
    tokenizer = self._predictor.tokenizer
    ids = tokenizer.encode(text)
    return ids if ids[-1] == tokenizer.eos_id else [*ids, tokenizer.eos_id]

  def _padded(self, ids: Sequence[int]) -> np.ndarray:
    """Returns i32[T], T a multiple of _WIDTH, so that few programs are compiled."""
    return np.array([*ids, *[self._predictor.tokenizer.pad_id] * (-len(ids) % _WIDTH)], np.int32)

  def _words(self, ids: Sequence[int], looked: Any, start: int) -> list[Word]:
    """Returns the words of ids[start:], with the sums over their pieces.

    The last id, [eos], counts only if it is the only one.
    """
    tokenizer = self._predictor.tokenizer
    merged: list[Word] = []
    for end in range(start + 1, max(len(ids), start + 2)):
      words = tokenizer.decode(ids[start:end]).split() or ["(nothing)"]
      maps = (looked.score[end - 2], looked.gradient[end - 2], looked.attention[end - 2])
      if len(words) <= len(merged):  # one more piece of the last word
        merged[-1] = Word(words[-1], *(a + b for a, b in zip(merged[-1][1:], maps)))
      else:
        merged.append(Word(words[-1], *maps))
    return [word._replace(score=float(word.score)) for word in merged]

  # ---- results with one score

  def match(self, image: Any, text: str, *, truncate: bool = False) -> Explanation:
    """Explains the log-odds that the text describes the image."""
    result = self._predictor.match(image, text, truncate=truncate)
    rows, frames, shown = self._images("match", [image])
    caption = self._predictor.text_rows("match")([text], truncate)
    return Explanation(
      result,
      text,
      shown,
      _only_word(text, self._run("match", frames, rows | {"caption": caption})[0]),
    )

  def entails(self, image: Any, statement: str, *, truncate: bool = False) -> Explanation:
    """Explains the predicted class."""
    return self._label(
      "entails",
      (image,),
      statement,
      truncate,
      self._predictor.entails(image, statement, truncate=truncate),
    )

  def compare(self, pair: Any, statement: str, *, truncate: bool = False) -> Explanation:
    """Explains the predicted class, with a map for each of the two images."""
    return self._label(
      "compare",
      tuple(pair),
      statement,
      truncate,
      self._predictor.compare(pair, statement, truncate=truncate),
    )

  def _label(
    self, method: str, images: tuple, statement: str, truncate: bool, result: Label
  ) -> Explanation:
    rows, _, shown = self._images(method, images)
    sentence = self._predictor.text_rows(method)([statement], truncate)
    label = np.array([[list(result.scores).index(result.label)]], np.int32)
    looked, _ = self._run(
      method, 0, {"image": rows["image"][None], "sentence": sentence[:, None], "label": label}
    )
    return Explanation(result, statement, shown, _only_word(result.label, looked))

  def locate(self, image: Any, phrase: str, *, truncate: bool = False) -> Explanation:
    """Explains the four numbers of a box; maps have the pixels of the image on its canvas."""
    rows, _, shown = self._images("locate", [image])
    phrases = self._predictor.text_rows("locate")([phrase], truncate)
    looked, located = self._run("locate", 0, rows | {"phrase": phrases[:, None]})
    corners = boxes.cut(np.asarray(located["box"])[0, 0], np.asarray(located["size"])[0]).tolist()
    box = Box(*corners, score=float(located["score"][0, 0]))
    maps = [
      _cut(x, rows["placed"][0], rows["image"].shape[1])
      for x in (looked.gradient, looked.attention)
    ]
    names = ("center x", "center y", "width", "height")
    words = [
      Word(name, float(score), gradient, attention)
      for name, score, gradient, attention in zip(names, looked.score, *maps)
    ]
    return Explanation(box, phrase, shown, words, (box[:4],))


def _only_word(text: str, looked: Any) -> list[Word]:
  """Returns the only word of a result with one score."""
  return [Word(text, float(looked.score[0]), looked.gradient[0], looked.attention[0])]


def _cut(maps: np.ndarray, placed: np.ndarray, size: int) -> np.ndarray:
  """Returns the part of maps that shows the image, f32[W, F, h, w].

  Args:
    maps: f32[W, F, G, G], over a canvas.
    placed: left, top, right, bottom of the image on the canvas, in pixels.
    size: side of the canvas in pixels.
  """
  left, top, right, bottom = placed.tolist()
  grown = [
    [
      np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))
      for grid in grids
    ]
    for grids in maps
  ]
  return np.maximum(np.array(grown), 0)[..., top:bottom, left:right]


def save_rows(
  explainer: Explainer,
  method: str,
  rows: Sequence[tuple | None],
  folder: str | os.PathLike,
  first: int,
  **options: Any,
) -> list[str | None]:
  """Writes a PNG for each row of a batch: `folder`/000012.png, ...

  Args:
    explainer: an Explainer.
    method: name of its method.
    rows: (image or pair, text or None); None: skipped.
    folder: created if missing.
    first: number of the first row.
    **options: of the method.

  Returns:
    The path of each row's file, or None.
  """
  os.makedirs(folder, exist_ok=True)
  paths = [
    os.path.join(folder, f"{number:06d}.png") if row else None
    for number, row in enumerate(rows, first)
  ]
  for path, row in zip(paths, rows):
    if row and path:
      getattr(explainer, method)(*(x for x in row if x is not None), **options).save(path)
  return paths
