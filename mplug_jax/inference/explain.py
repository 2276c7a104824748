"""What a Predictor says, with where it looked: for an answer, each word of it or of a caption, a match, a class or a box.

    explainer = Explainer(Predictor.load("runs/vqa"))
    explainer.answer("dog.jpg", "what is it chasing?").save("looked.png")

See attention_maps.py for what the maps are, and for what "gradient" and "attention" mean.
"""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mplug_jax.data.images import ops
from mplug_jax.inference import attention_maps, inputs
from mplug_jax.inference.results import Answer, Box, Label, Match
from mplug_jax.reporting import overlay as overlay_lib
from mplug_jax.reporting import sample_sheet

MAPS = ("gradient", "attention")
_WIDTH = 8  # answers and captions are padded to a multiple of it


class Word(NamedTuple):
  """A word, or what else has a score of its own. score: its log-probability (of a match log-odds). gradient, attention: f32[F, G, G], grids
  over each of F images, not negative."""

  text: str
  score: float
  gradient: np.ndarray
  attention: np.ndarray


class Explanation(NamedTuple):
  """result: as of the Predictor's method. asked: the question, phrase or statement. images: F of u8[H, W, 3], upright. words: of what
  was said. boxes: of the first image, corners in pixels."""

  result: Any
  asked: str
  images: list
  words: list
  boxes: tuple = ()

  def map(self, kind="gradient", word=None):
    """f32[F, G, G]: of one word by its number, or the sum over all; kind: of MAPS. Raises ValueError: another kind."""
    if kind not in MAPS:
      raise ValueError(f"{kind!r} is not a map; there are {', '.join(MAPS)}.")
    return sum(getattr(one, kind) for one in (self.words if word is None else [self.words[word]]))

  def picture(self, image=0):
    """One image with the boxes alone -> u8[H', W', 3], see plots.overlay."""
    return overlay_lib.overlay(self.images[image], None, self.boxes if image == 0 else ())

  def overlay(self, kind="gradient", word=None, image=0):
    """One image with the map over it and the boxes -> u8[H', W', 3], see plots.overlay."""
    return overlay_lib.overlay(
      self.images[image], self.map(kind, word)[image], self.boxes if image == 0 else ()
    )

  def save(self, path, kind="gradient"):
    """Writes a sheet as PNG: the images, the map of everything, and those of the words where there are several."""
    said, numbers = _said(self.result), range(len(self.images))
    cells = [(self.picture(i), sample_sheet.Sample(self.asked, said, "", "open")) for i in numbers]
    cells += [
      (self.overlay(kind, None, i), sample_sheet.Sample("where it looked", said, "", "open"))
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


def _said(result):
  """A result of a Predictor in words."""
  if isinstance(result, Label):
    return f"{result.label} ({result.score:.2f})"
  if isinstance(result, Match):
    return f"match {result.probability:.2f}"
  if isinstance(result, Box):
    return f"box {', '.join(f'{x:.0f}' for x in result[:4])}"
  return result.text


class Explainer:
  """Explains what a Predictor says about one image, or one clip, at a time; arguments and errors as of its methods."""

  def __init__(self, of):
    """of: a Predictor."""
    self._predictor = of
    self._look = functools.lru_cache(None)(self._make_look)

  def _make_look(self, method, frames, **changes):
    """-> jitted (params, batch) -> (attention_maps.Looked, what `locate` predicts)."""
    task = self._predictor.task(method, frames, **changes)

    def look(params, batch):
      found = {}
      if method == "locate":
        found = task.predict_fns()["locate"](params, batch | {"box": jnp.zeros((1, 1, 4))})
        batch = batch | {
          "bins": found["bins"],
          "box": attention_maps.box_of_bins(found["bins"], task.config.task.bins),
        }
      return attention_maps.look(task, params, batch), found

    return jax.jit(look)

  def _run(self, method, frames, batch, **changes):
    with jax.set_mesh(self._predictor.mesh):
      looked, found = self._look(method, frames, **changes)(self._predictor.params, batch)
    return jax.tree.map(lambda x: np.asarray(x[0]), looked), found

  def _images(self, method, images):
    """-> (rows of Predictor.image_rows, number of frames, images to show)."""
    rows = self._predictor.image_rows(method, images)
    if inputs.is_clip(images[0]):
      return rows, rows["image"].shape[1], list(rows["image"][0])
    return rows, 0, [ops.decode_image(image) for image in images]

  # ---- what has words

  def answer(self, image, question, answer=None, *, truncate=False):
    """answer: one to explain instead of the Predictor's own."""
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

  def caption(self, image, *, prompt=None):
    """Every word that the model found itself, none of the prompt."""
    result = self._predictor.caption(image, prompt=prompt)
    rows, frames, shown = self._images("caption", [image])
    changes = {} if prompt is None else {"prompt": prompt}
    task = self._predictor.task("caption", frames, **changes)
    ids = self._ids(task.prompt.text + result.text)
    batch = {"caption": self._padded(ids)[None, None], "caption_valid": np.ones((1, 1), bool)}
    looked, _ = self._run("caption", frames, rows | batch, **changes)
    return Explanation(result, prompt or "", shown, self._words(ids, looked, len(task.prompt.ids)))

  def _ids(self, text):
    """[bos] pieces [eos]."""
    tokenizer = self._predictor.tokenizer
    ids = tokenizer.encode(text)
    return ids if ids[-1] == tokenizer.eos_id else [*ids, tokenizer.eos_id]

  def _padded(self, ids):
    """-> i32[T], T a multiple of _WIDTH, so that few programs are compiled."""
    return np.array([*ids, *[self._predictor.tokenizer.pad_id] * (-len(ids) % _WIDTH)], np.int32)

  def _words(self, ids, looked, start):
    """Words of ids[start:] without the last one, [eos]; that one where there is no other. Pieces of a word count together."""
    tokenizer, found = self._predictor.tokenizer, []
    for end in range(start + 1, max(len(ids), start + 2)):
      words = tokenizer.decode(ids[start:end]).split() or ["(nothing)"]
      maps = (looked.score[end - 2], looked.gradient[end - 2], looked.attention[end - 2])
      if len(words) <= len(found):  # one more piece of the last word
        found[-1] = Word(words[-1], *(a + b for a, b in zip(found[-1][1:], maps)))
      else:
        found.append(Word(words[-1], *maps))
    return [word._replace(score=float(word.score)) for word in found]

  # ---- what has one score

  def match(self, image, text, *, truncate=False):
    """The log-odds that the text describes the image."""
    result = self._predictor.match(image, text, truncate=truncate)
    rows, frames, shown = self._images("match", [image])
    caption = self._predictor.text_rows("match")([text], truncate)
    return Explanation(
      result, text, shown, _whole(text, self._run("match", frames, rows | {"caption": caption})[0])
    )

  def entails(self, image, statement, *, truncate=False):
    """The class that the Predictor chose."""
    return self._label(
      "entails",
      (image,),
      statement,
      truncate,
      self._predictor.entails(image, statement, truncate=truncate),
    )

  def compare(self, pair, statement, *, truncate=False):
    """The class that the Predictor chose, with a map for each of the two images."""
    return self._label(
      "compare",
      tuple(pair),
      statement,
      truncate,
      self._predictor.compare(pair, statement, truncate=truncate),
    )

  def _label(self, method, images, statement, truncate, result):
    rows, _, shown = self._images(method, images)
    sentence = self._predictor.text_rows(method)([statement], truncate)
    label = np.array([[list(result.scores).index(result.label)]], np.int32)
    looked, _ = self._run(
      method, 0, {"image": rows["image"][None], "sentence": sentence[:, None], "label": label}
    )
    return Explanation(result, statement, shown, _whole(result.label, looked))

  def locate(self, image, phrase, *, truncate=False):
    """The four numbers of the box. Maps are grids of pixels here: of the part of the square canvas that shows the image."""
    rows, _, shown = self._images("locate", [image])
    phrases = self._predictor.text_rows("locate")([phrase], truncate)
    looked, found = self._run("locate", 0, rows | {"phrase": phrases[:, None]})
    box = Box(*np.asarray(found["box"])[0, 0].tolist(), float(found["score"][0, 0]))
    maps = [
      _cut(x, rows["placed"][0], rows["image"].shape[1])
      for x in (looked.gradient, looked.attention)
    ]
    names = "centre x", "centre y", "width", "height"
    words = [
      Word(name, float(score), *each) for name, score, *each in zip(names, looked.score, *maps)
    ]
    return Explanation(box, phrase, shown, words, (box[:4],))


def _whole(text, looked):
  """Looked of one row with one score -> the only Word."""
  return [Word(text, float(looked.score[0]), looked.gradient[0], looked.attention[0])]


def _cut(maps, placed, size):
  """Maps f32[W, F, G, G] of a canvas of `size` pixels -> f32[W, F, h, w], the pixels of `placed`: left, top, right, bottom."""
  left, top, right, bottom = placed.tolist()
  grown = [
    [np.asarray(Image.fromarray(grid).resize((size, size), Image.BICUBIC)) for grid in grids]
    for grids in maps
  ]
  return np.maximum(np.array(grown), 0)[..., top:bottom, left:right]


def save_rows(explainer, method, rows, folder, first, **options):
  """Writes a sheet for each row of a command's batch: `folder`/000012.png, ... -> [its path or None].

  Args:
    method: of Explainer. rows: [(image or pair, text or None)], None for a row that cannot be explained. first: number of the first row.
    options: of the method.
  """
  os.makedirs(folder, exist_ok=True)
  paths = [
    os.path.join(folder, f"{number:06d}.png") if row else None
    for number, row in enumerate(rows, first)
  ]
  for path, row in zip(paths, rows):
    if row:
      getattr(explainer, method)(*(x for x in row if x is not None), **options).save(path)
  return paths
