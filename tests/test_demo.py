"""The functions behind the demo page, and the page where gradio is installed."""

import pathlib
import types

import numpy as np
import pytest
from PIL import Image

from mplug_jax import demo
from mplug_jax.inference import explain, page
from mplug_jax.inference.results import Answer, Box, Hit
from tests.support import tiny_predictor


class Model:
  """The methods of a Predictor and an Explainer that the page calls.

  This one sees everything in the upper left.
  """

  path = "runs/any"

  def __init__(self, *methods):
    self._methods = methods

  def can(self, method):
    return method in self._methods

  def _explained(self, image, text, result, boxes=()):
    heat = np.eye(1, 4, dtype=np.float32).reshape(1, 2, 2)
    with Image.open(image) as opened:
      pixels = np.asarray(opened.convert("RGB"))
    return explain.Explanation(
      result, text, [pixels], [explain.Word(word, -1.0, heat, heat) for word in ("a", "dog")], boxes
    )

  def answer(self, image, question):
    if not question:
      raise ValueError("The question '' is empty: it has no words.")
    return self._explained(image, question, Answer("a dog", -2.0))

  def locate(self, image, phrase):
    return self._explained(image, phrase, Box(8, 8, 20, 20, -1.0), ((8, 8, 20, 20),))

  def index(self, images):
    return types.SimpleNamespace(images=images)

  def search(self, query, index, k):
    return [Hit(n, image, 0.5, 0.5) for n, image in enumerate(index.images[:k])]

  def match(self, image, text):
    return self._explained(image, text, None)


@pytest.fixture
def image(tmp_path):
  return str(tiny_predictor.photograph(tmp_path / "wide.png", 96, 48))


def pages(*methods, **options):
  return page.Pages(Model(*methods), Model(*methods), **options)


def test_answers_come_with_the_maps_of_their_words(image):
  answer, shown = pages("answer").ask("answer", image, "what is it?")
  assert answer == "a dog"
  assert [text for _, text in shown] == ["attention map", "a", "dog"]
  picture = shown[0][0].astype(int)
  assert picture.shape == (144, 288, 3)
  assert picture[:30, :60].sum() > 2 * picture[-30:, -60:].sum()


def test_boxes_are_drawn(image):
  text, shown = pages("locate").ask("locate", image, "it")
  assert text.startswith("left 8, top 8, right 20, bottom 20")
  assert (shown[0][0][3 * 8, 3 * 8 : 3 * 20] == (61, 245, 107)).all()


def test_search_in_uploads_or_in_a_folder(image, tmp_path):
  answer, shown = pages("embed", "match").search("a dog", [image, image])
  assert answer.startswith("2 images")
  assert [text for _, text in shown] == [
    "1: 0.50",
    "attention map of 1",
    "2: 0.50",
  ]
  assert pages("embed", folder=str(tmp_path)).search("a dog", None)[0].startswith("1 images")
  assert pages("embed").search("a dog", None) == ("Upload the images to search in.", [])
  with pytest.raises(ValueError, match="has no image"):
    pages("embed", folder=str(tmp_path / "empty"))


def test_what_cannot_be_used_is_one_sentence(tmp_path, image):
  tabs = pages("answer")
  corrupt = tmp_path / "corrupt.png"
  huge = tmp_path / "huge.png"
  corrupt.write_bytes(b"\x89PNG\r\n\x1a\n" + b"garbage" * 50)
  Image.new("1", (6000, 6000)).save(huge)
  assert tabs.ask("answer", str(corrupt), "what?") == (
    "corrupt.png cannot be read as an image; upload a JPEG or PNG.",
    [],
  )
  assert tabs.ask("answer", str(huge), "what?") == (
    "huge.png has 6000 x 6000 pixels, more than 25 million; make it smaller.",
    [],
  )
  assert tabs.ask("answer", None, "what?") == ("Choose an image first.", [])
  assert "empty" in tabs.ask("answer", image, "")[0]
  truncated = tmp_path / "cut.png"
  truncated.write_bytes(pathlib.Path(image).read_bytes()[:400])  # its header is complete
  assert tabs.ask("answer", str(truncated), "what?")[1] == []
  with pytest.raises(ValueError, match="runs/any supports none of the tabs"):
    pages("compare")


def test_the_page_has_the_tabs_that_the_checkpoint_can_do(image):
  gradio = pytest.importorskip("gradio")
  blocks = demo.build(pages("answer", "embed", "match"))
  assert [block.label for block in blocks.blocks.values() if isinstance(block, gradio.Tab)] == [
    "Ask",
    "Search",
  ]
  import gradio_client

  _, url, _ = demo.launch(blocks, "127.0.0.1", None, prevent_thread_lock=True)
  try:
    client = gradio_client.Client(url, verbose=False)
    text, shown = client.predict(
      gradio_client.handle_file(image), "what is it?", api_name="/answer"
    )
    assert text == "a dog"
    assert len(shown) == 3
    assert client.predict(gradio_client.handle_file(image), "", api_name="/answer")[0].endswith(
      "no words."
    )
  finally:
    blocks.close()
