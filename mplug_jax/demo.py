"""Demo page in the browser: questions, captions, search and boxes, with attention maps.

    python -m mplug_jax.demo --checkpoint=runs/vqa

serves the tabs that the checkpoint supports at http://127.0.0.1:7860. --host=0.0.0.0 makes the page
available to other machines; --images=FOLDER adds a folder of images to search. The page needs
gradio (`pip install -e ".[demo]"`) and no internet.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mplug_jax import Predictor, tune_process
from mplug_jax.checkpoints import errors
from mplug_jax.inference import methods, page

MAX_MEGABYTES = 10  # of an upload


def build(pages: page.Pages) -> Any:
  """Returns the page as gradio.Blocks, with a tab for each supported method."""
  gradio = _gradio()
  with gradio.Blocks(title="mPLUG", analytics_enabled=False) as blocks:
    gradio.Markdown(f"## mPLUG\n{pages.predictor.path}")
    for method, function in pages.functions().items():
      tab = methods.METHODS[method].tab
      assert tab is not None
      with gradio.Tab(tab.title), gradio.Row():
        _tab(tab, function, method if tab.describe else "search")
  return blocks


def _gradio() -> Any:
  """Imports gradio, which is optional, with its usage statistics turned off."""
  os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
  import gradio  # pyright: ignore[reportMissingImports] extra "demo"

  return gradio


def _tab(tab: methods.Tab, function: Callable, api_name: str) -> None:
  """Adds the fields of a tab and their events to the page."""
  gradio = _gradio()
  with gradio.Column():
    image = None if tab.describe is None else _image_field()
    text = gradio.Textbox(label=tab.label, placeholder=tab.example) if tab.label else None
    files = _files_field() if tab.describe is None else None
    button = gradio.Button(tab.button, variant="primary")
  with gradio.Column():
    answer = gradio.Textbox(label="Result", interactive=False)
    gallery = gradio.Gallery(
      label="Attention maps", columns=3, object_fit="contain", interactive=False
    )
  gradio.on(
    [button.click, *([text.submit] if text else [])],
    function,
    [field for field in (image, text, files) if field is not None],
    [answer, gallery],
    concurrency_limit=1,  # all tabs share the model
    concurrency_id="model",
    api_name=api_name,
  )


def _image_field() -> Any:
  image = _gradio().Image(
    type="filepath", sources=["upload", "clipboard"], label="Image", height=320
  )
  # Passes on the uploaded file: gradio would decode it and fail on a damaged image.
  image.preprocess = _uploaded_path
  return image


def _uploaded_path(payload: Any) -> Any:
  return payload and payload.path


def _files_field() -> Any:
  return _gradio().File(
    file_count="multiple", file_types=["image"], label="Images to search", type="filepath"
  )


def launch(blocks: Any, host: str, port: int | None, **options: Any) -> Any:
  """Serves the page with system fonts, so that it needs no internet.

  Args:
    blocks: returned by `build`.
    host: address to listen at.
    port: None: a free one.
    **options: of gradio.Blocks.launch.

  Returns:
    The result of gradio.Blocks.launch.
  """
  gradio = _gradio()
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


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  add = parser.add_argument
  add("--checkpoint", required=True, help="run folder, or output of tools.convert_checkpoint")
  add("--config", help="configs/vqa.py:base, for converted weights; default: the run's")
  add("--tokenizer", help="vocab.txt, for converted weights; default: the run's")
  add("--images", default="", help="folder of images to search")
  add("--host", default="127.0.0.1", help="address to listen at; default: %(default)s")
  add("--port", type=int, default=7860, help="default: %(default)s")
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Serves the page until it is stopped; returns the exit status."""
  options = _parse(argv)
  tune_process()
  try:
    predictor = Predictor.load(options.checkpoint, options.config, options.tokenizer)
    blocks = build(page.Pages(predictor, folder=options.images))
    print(f"http://{options.host}:{options.port}", flush=True)
    launch(blocks, options.host, options.port)
  except ModuleNotFoundError as error:
    print(
      f"error: The page needs {error.name}; install it with pip install -e '.[demo]'.",
      file=sys.stderr,
    )
    return 1
  except (*page.PROBLEMS, errors.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
