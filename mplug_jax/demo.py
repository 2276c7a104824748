"""A page in the browser for a checkpoint: questions, captions, search and boxes, with where the model looked.

    python -m mplug_jax.demo --checkpoint=runs/vqa

shows what the checkpoint can do at http://127.0.0.1:7860; --host=0.0.0.0 lets other machines in, who then may use the model and nothing
else. Needs gradio, `pip install -e ".[demo]"`, and no internet. --images=FOLDER are the images to search in, beside those that are
uploaded.
"""

import argparse
import os
import pathlib
import sys

from PIL import Image

from mplug_jax import Predictor, tune_process
from mplug_jax.checkpoints import errors
from mplug_jax.data.images import ops
from mplug_jax.inference import explain

MAX_MEGABYTES = 10  # of an upload
MAX_PIXELS = 25_000_000  # width * height of an image
MAX_IMAGES = 1000  # to search in
_HITS = 8
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABS = {
  "answer": "Ask",
  "caption": "Describe",
  "embed": "Search",
  "locate": "Locate",
}  # {method of Predictor: its tab}
_PROBLEMS = (ValueError, TypeError, OSError)


def checked(path):
  """The path of an upload, if it is an image of sensible size. Raises ValueError, one sentence."""
  if path is None:
    raise ValueError("Choose an image first.")
  name = os.path.basename(path)
  try:
    with Image.open(path) as image:  # reads the header only
      width, height = image.size
  except Exception as error:  # decoders raise anything on damaged bytes
    raise ops.ImageError(f"{name} cannot be read as an image; upload a JPEG or PNG.") from error
  if width * height > MAX_PIXELS:
    raise ValueError(
      f"{name} has {width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million; make it smaller."
    )
  return path


def _told(function):
  """A function of the page whose problems become its first output, one sentence, with nothing to see."""

  def call(*arguments):
    try:
      return function(*arguments)
    except _PROBLEMS as error:
      return f"{str(error).splitlines()[0]}", []

  return call


class Pages:
  """What the page's buttons do: uploads and texts -> (text, [(picture u8[H, W, 3] or path, caption)])."""

  def __init__(self, predictor, explainer=None, folder=""):
    """predictor: a Predictor. explainer: by default its Explainer. folder: of images to search in.

    Raises:
      ValueError: no image in `folder`.
    """
    self.predictor, self.explainer = predictor, explainer or explain.Explainer(predictor)
    self.tabs = [method for method in TABS if predictor.can(method)]
    if not self.tabs:
      raise ValueError(
        f"{predictor.path} can do nothing of what the page shows: {', '.join(TABS.values()).lower()}."
      )
    self._images = (
      sorted(
        str(path) for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in _SUFFIXES
      )
      if folder
      else []
    )
    if folder and not self._images:
      raise ValueError(f"--images={folder} has no image.")
    self._index = (
      predictor.index(self._images[:MAX_IMAGES]) if self._images and "embed" in self.tabs else None
    )
    self.answer, self.caption, self.search, self.locate = map(
      _told, (self._answer, self._caption, self._search, self._locate)
    )

  def _answer(self, image, question):
    found = self.explainer.answer(checked(image), question or "")
    return found.result.text or "(no answer)", _pictures(found)

  def _caption(self, image):
    found = self.explainer.caption(checked(image))
    return found.result.text or "(no caption)", _pictures(found)

  def _locate(self, image, phrase):
    found = self.explainer.locate(checked(image), phrase or "")
    x0, y0, x1, y1, _ = found.result
    said = f"left {x0:.0f}, top {y0:.0f}, right {x1:.0f}, bottom {y1:.0f} (pixels)"
    return said, [(found.picture(), "the box"), (found.overlay(), "where it looked")]

  def _search(self, query, uploads):
    if uploads:
      index = self.predictor.index([checked(path) for path in uploads[:MAX_IMAGES]])
    elif self._index is not None:
      index = self._index
    else:
      raise ValueError("Upload the images to search in.")
    hits = self.predictor.search(query or "", index, k=_HITS)
    shown = [(hit.image, f"{place}: {hit.similarity:.2f}") for place, hit in enumerate(hits, 1)]
    if hits and self.predictor.can("match"):
      shown.insert(1, (self.explainer.match(hits[0].image, query).overlay(), "seen in 1"))
    return f"{len(index.images)} images searched; their similarity to the text is given", shown


def _pictures(found):
  """An Explanation -> the image with its map, and with those of the words where there are several."""
  words = (
    [(found.overlay(word=n), word.text) for n, word in enumerate(found.words)]
    if len(found.words) > 1
    else []
  )
  return [(found.overlay(), "where it looked"), *words]


def build(pages):
  """Pages -> gradio.Blocks, a tab for each thing that the checkpoint can do."""
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
  import gradio

  def image_and_text(label, example, button, function):
    with gradio.Row():
      with gradio.Column():
        image = gradio.Image(
          type="filepath", sources=["upload", "clipboard"], label="Image", height=320
        )
        # As it was sent: gradio would decode it, and an image that is none would be an error of its own.
        image.preprocess = lambda payload: payload and payload.path
        inputs = [image, gradio.Textbox(label=label, placeholder=example)] if label else [image]
        pressed = gradio.Button(button, variant="primary")
      shown(inputs, pressed, function)

  def shown(inputs, pressed, function):
    with gradio.Column():
      said = gradio.Textbox(label="The model says", interactive=False)
      seen = gradio.Gallery(
        label="Where it looked", columns=3, object_fit="contain", interactive=False
      )
    # One at a time: they share the model.
    events = [pressed.click, *(x.submit for x in inputs if isinstance(x, gradio.Textbox))]
    gradio.on(
      events,
      function,
      inputs,
      [said, seen],
      concurrency_limit=1,
      concurrency_id="model",
      api_name=function_name(function),
    )

  def function_name(function):
    return next(
      name for name in ("answer", "caption", "search", "locate") if getattr(pages, name) is function
    )

  def search():
    with gradio.Row():
      with gradio.Column():
        query = gradio.Textbox(
          label="What to look for", placeholder="a red circle above a blue square"
        )
        files = gradio.File(
          file_count="multiple", file_types=["image"], label="Images to search in", type="filepath"
        )
        pressed = gradio.Button("Search", variant="primary")
      shown([query, files], pressed, pages.search)

  tabs = {
    "answer": lambda: image_and_text("Question", "what color is the circle?", "Ask", pages.answer),
    "caption": lambda: image_and_text("", "", "Describe", pages.caption),
    "embed": search,
    "locate": lambda: image_and_text(
      "What to find", "the large red circle", "Locate", pages.locate
    ),
  }
  with gradio.Blocks(title="mPLUG", analytics_enabled=False) as blocks:
    gradio.Markdown(f"## mPLUG\n{pages.predictor.path}")
    for method in pages.tabs:
      with gradio.Tab(TABS[method]):
        tabs[method]()
  return blocks


def launch(blocks, host, port, **options):
  """Serves the page; options of gradio.Blocks.launch. Nothing is loaded from elsewhere: fonts are the system's."""
  import gradio

  theme = gradio.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
  )
  return blocks.launch(
    server_name=host,
    server_port=port,
    share=False,
    max_file_size=f"{MAX_MEGABYTES}mb",
    theme=theme,
    show_error=False,
    ssr_mode=False,
    quiet=True,
    **options,
  )


def _parse(argv):
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument(
    "--checkpoint", required=True, help="run folder, or what tools.convert_checkpoint made"
  )
  parser.add_argument(
    "--config", help="FILE:ARGUMENT, for weights that do not say what they were trained for"
  )
  parser.add_argument("--tokenizer", help="vocab.txt of converted weights")
  parser.add_argument("--images", default="", help="folder of images to search in")
  parser.add_argument(
    "--host",
    default="127.0.0.1",
    help="address to listen at; default: %(default)s, this machine alone",
  )
  parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
  return parser.parse_args(argv)


def main(argv=None):
  """Serves until it is stopped. Returns the exit status: 0, or 1 after one sentence on stderr."""
  options = _parse(argv)
  tune_process()
  try:
    blocks = build(
      Pages(
        Predictor.load(options.checkpoint, options.config, options.tokenizer), folder=options.images
      )
    )
    print(f"http://{options.host}:{options.port}", flush=True)
    launch(blocks, options.host, options.port)
  except ModuleNotFoundError as error:
    print(f"error: the page needs {error.name}: pip install -e '.[demo]'", file=sys.stderr)
    return 1
  except (*_PROBLEMS, errors.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
