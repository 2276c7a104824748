"""Converts PyTorch weights: `python -m tools.convert_checkpoint SOURCE DEST`.

Code in the file is never executed.
"""

import argparse
import sys
from collections.abc import Sequence

from mplug_jax.conversion import importer, storage
from mplug_jax.conversion import manifest as manifest_lib
from mplug_jax.tensor_files import finite

# Fields of the model that tensor shapes do not determine.
_FIELDS = {
  "stride": "of connected layers; default 6 for a model with visn_fc, else 3",
  "heads": "of the text model; default width / 64, or from a config.json beside the file",
  "vision_heads": "of the image encoder; same default",
  "text_layers": "layers of a BERT checkpoint for the text encoder; default 6",
  "fusion_layers": "that run; default 6",
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "source",
    help="mPLUG .pth, ModelScope .bin, DeepSpeed folder, CLIP .pt, BERT, or .safetensors of these",
  )
  parser.add_argument("dest", help="folder to create, or a .safetensors file")
  parser.add_argument(
    "--image_size",
    type=int,
    default=0,
    help="image size in pixels, to which position embeddings are resized; 0: unchanged",
  )
  parser.add_argument(
    "--dtype",
    choices=["float32", "bfloat16", "float16"],
    help="dtype of the result; default: that of each tensor",
  )
  parser.add_argument(
    "--zero_positions",
    action="store_true",
    help="set position embeddings to zero, as the official code when it starts from CLIP",
  )
  parser.add_argument(
    "--keep_dead",
    action="store_true",
    help="also keep unused tensors, for a later export",
  )
  parser.add_argument(
    "--allow_nonfinite",
    action="store_true",
    help="convert values that are NaN or infinite instead of refusing them",
  )
  parser.add_argument(
    "--verbose",
    action="store_true",
    help="print the destination of each tensor, or the reason for none",
  )
  for name, text in _FIELDS.items():
    parser.add_argument(f"--{name}", type=int, help=text)
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the tool; returns 0, or 1 after one sentence on stderr."""
  options = vars(_parse(argv))
  verbose = options.pop("verbose")
  dest = options.pop("dest")
  overrides = {name: value for name in _FIELDS if (value := options.pop(name)) is not None}
  try:
    manifest = importer.convert_checkpoint(options.pop("source"), dest, **options, **overrides)
  except (ValueError, OSError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  if verbose:
    print("\n".join(manifest_lib.tensor_lines(manifest)))
  print("\n".join(manifest_lib.summary(manifest)))
  if counts := manifest.get("nonfinite"):
    print(f"warning: {finite.describe(counts)}.", file=sys.stderr)
  print(f"geometry: {', '.join(f'{name}={value}' for name, value in manifest['geometry'].items())}")
  in_file = storage.is_file(dest)
  print(f"manifest: {f'in the metadata of {dest}' if in_file else f'{dest}/manifest.json'}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
