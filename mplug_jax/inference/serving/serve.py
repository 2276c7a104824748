"""Runs an exported function, without mplug_jax: `python serve.py answer dog.jpg "what is this?"`.

`tools.export_serving` copies this file into the folder that it writes. It needs jax, flatbuffers,
numpy, Pillow, and tokenizers or sentencepiece, whichever serving.json names. JAX compiles the
function anew for every batch size, so a server should pad its batches to a few sizes.
"""

import json
import pathlib
import sys

import jax
from jax import export

FOLDER = pathlib.Path(__file__).parent


def main(name: str, image: str, *texts: str) -> None:
  """Prints the outputs of an exported function for one image.

  Args:
    name: function of serving.json.
    image: path of an image.
    *texts: texts about the image, as many as the function takes.
  """
  # Beside this file in an exported folder, but not a module of the package.
  from inputs import Tokenizer, make_batch, read_weights  # pyright: ignore[reportMissingImports]

  about = json.loads((FOLDER / "serving.json").read_text())
  tokenizer = Tokenizer(FOLDER, about["tokenizer"])
  weights = jax.device_put(read_weights(FOLDER / "weights.safetensors"))
  function = jax.jit(export.deserialize(bytearray((FOLDER / f"{name}.jax").read_bytes())).call)
  outputs = function(weights, make_batch(about, name, tokenizer, [image], texts))
  print({key: value.tolist() for key, value in outputs.items()})
  if "tokens" in outputs:
    text = tokenizer.decode(outputs["tokens"].reshape(-1, outputs["tokens"].shape[-1])[0])
    print(text.removeprefix(about["functions"][name].get("prompt", "")).strip())


if __name__ == "__main__":
  main(*sys.argv[1:])
