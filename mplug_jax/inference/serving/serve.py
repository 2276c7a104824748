"""An example that runs what tools.export_serving wrote, without mplug_jax:

    python serve.py answer dog.jpg "what is this?"

Needs jax, flatbuffers, numpy, Pillow, and tokenizers or sentencepiece, whichever serving.json
names. A batch of a new size is compiled when it comes, so a server pads to a few sizes.
"""

import json
import pathlib
import sys

import jax
from inputs import Tokenizer, make_batch, read_weights  # beside this file
from jax import export

FOLDER = pathlib.Path(__file__).parent

if __name__ == "__main__":
  name, image, *text = sys.argv[1:]
  about = json.loads((FOLDER / "serving.json").read_text())
  tokenizer = Tokenizer(FOLDER, about["tokenizer"])
  weights = jax.device_put(read_weights(FOLDER / "weights.safetensors"))
  function = jax.jit(export.deserialize(bytearray((FOLDER / f"{name}.jax").read_bytes())).call)
  out = function(weights, make_batch(about, name, tokenizer, [image], text))
  print({key: value.tolist() for key, value in out.items()})
  if "tokens" in out:
    said = tokenizer.decode(out["tokens"].reshape(-1, out["tokens"].shape[-1])[0])
    print(said.removeprefix(about["functions"][name].get("prompt", "")).strip())
