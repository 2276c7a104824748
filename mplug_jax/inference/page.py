"""Functions behind the demo page, without gradio: uploads and texts in, a text and pictures out."""

import os
from collections.abc import Callable
from typing import Any

from PIL import Image

from mplug_jax.data.errors import ImageError, note
from mplug_jax.data.storage import image_folder
from mplug_jax.inference import explain, methods

MAX_PIXELS = 25_000_000  # width * height of an image
MAX_IMAGES = 1000  # searched
PROBLEMS = (ValueError, TypeError, OSError)  # shown to the user
_HITS = 8

Shown = tuple[str, list]  # a text, and [(picture u8[H, W, 3] or path, caption)]


def checked(path: str | None) -> str:
  """Returns the path of an uploaded image.

  Raises:
    ValueError: not an image, or one of more than MAX_PIXELS; one sentence.
  """
  if path is None:
    raise ValueError("Choose an image first.")
  name = os.path.basename(path)
  try:
    with Image.open(path) as image:  # reads the header only
      width, height = image.size
  except Exception as error:  # decoders raise anything on damaged bytes
    raise ImageError(f"{name} cannot be read as an image; upload a JPEG or PNG.") from error
  if width * height > MAX_PIXELS:
    raise ValueError(
      f"{name} has {width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million; "
      "make it smaller."
    )
  return path


class Pages:
  """The tabs of the demo page for one checkpoint.

  Attributes:
    predictor: the Predictor.
    tabs: methods of Predictor with a tab that the checkpoint supports.
  """

  def __init__(
    self, predictor: Any, explainer: explain.Explainer | None = None, folder: str = ""
  ) -> None:
    """Indexes the images of the folder.

    Args:
      predictor: a Predictor.
      explainer: default: Explainer(predictor).
      folder: images to search in.

    Raises:
      ValueError: the checkpoint supports no tab, or the folder has no images.
    """
    self.predictor = predictor
    self._explainer = explainer or explain.Explainer(predictor)
    titles = {name: row.tab.title for name, row in methods.METHODS.items() if row.tab}
    self.tabs = [method for method in titles if predictor.can(method)]
    if not self.tabs:
      shown = ", ".join(titles.values()).lower()
      raise ValueError(f"{predictor.path} supports none of the tabs of the page: {shown}.")
    images = _images(folder) if folder else []
    searches = images and "embed" in self.tabs
    self._index = predictor.index(images[:MAX_IMAGES]) if searches else None

  def functions(self) -> dict[str, Callable[..., Shown]]:
    """Returns {method: function of its tab}."""
    functions: dict[str, Callable[..., Shown]] = {}
    for method in self.tabs:
      tab = methods.METHODS[method].tab
      assert tab is not None
      functions[method] = self._explaining(method, tab) if tab.describe else self.search
    return functions

  def ask(self, method: str, image: str | None, text: str | None = None) -> Shown:
    """Returns the result of a method for an uploaded image, and its attention maps.

    Args:
      method: of Predictor, with a tab.
      image: path of the upload.
      text: for methods that read one.

    Returns:
      The result as text, or the problem in one sentence; [(picture, caption)].
    """
    tab = methods.METHODS[method].tab
    assert tab is not None
    assert tab.describe is not None
    try:
      texts = [text or ""] if tab.label else []
      explanation = getattr(self._explainer, method)(checked(image), *texts)
      return tab.describe(explanation.result), _pictures(explanation)
    except PROBLEMS as error:
      return _sentence(error), []

  def search(self, query: str | None, uploads: list[str] | None) -> Shown:
    """Returns the images most similar to a text: of the uploads, or else of the folder.

    Args:
      query: the text.
      uploads: paths of images.

    Returns:
      The number of images, or the problem in one sentence; [(image, rank and similarity)].
    """
    try:
      return self._search(query or "", uploads)
    except PROBLEMS as error:
      return _sentence(error), []

  def _explaining(self, method: str, tab: methods.Tab) -> Callable[..., Shown]:
    if tab.label:
      return lambda image, text: self.ask(method, image, text)
    return lambda image: self.ask(method, image)

  def _search(self, query: str, uploads: list[str] | None) -> Shown:
    if uploads:
      index = self.predictor.index([checked(path) for path in uploads[:MAX_IMAGES]])
    elif self._index is not None:
      index = self._index
    else:
      raise ValueError("Upload the images to search in.")
    hits = self.predictor.search(query, index, k=_HITS)
    shown = [(hit.image, f"{rank}: {hit.similarity:.2f}") for rank, hit in enumerate(hits, 1)]
    if hits and self.predictor.can("match"):
      shown.insert(1, (self._explainer.match(hits[0].image, query).overlay(), "attention map of 1"))
    return f"{len(index.images)} images searched; numbers: similarity to the text", shown


def _images(folder: str) -> list[str]:
  """Returns the paths of all images under a folder. Raises ValueError: none."""
  files = image_folder.find_images(folder) if os.path.isdir(folder) else None
  if files is None or not files.paths:
    raise ValueError(f"--images={folder} has no images.")
  if skipped := files.skipped():
    note(skipped)
  return files.paths


def _sentence(error: Exception) -> str:
  return str(error).splitlines()[0]


def _pictures(explanation: explain.Explanation) -> list:
  """Returns [(picture, caption)]: the boxes, the map, and the maps of several words."""
  overlay = (explanation.overlay(), "attention map")
  if explanation.boxes:
    return [(explanation.picture(), "the box"), overlay]
  words = explanation.words if len(explanation.words) > 1 else []
  return [overlay, *((explanation.overlay(word=n), word.text) for n, word in enumerate(words))]
