"""Converts PyTorch weights to a checkpoint: `python -m tools.convert_checkpoint SOURCE DEST`.

No code in the file is executed.
"""

import argparse
import sys
from collections.abc import Sequence

from mplug_jax.conversion import importer, storage
from mplug_jax.conversion import manifest as manifest_lib

# Fields of the model that cannot be inferred from shapes.
_FIELDS = {
  "stride": "of connected layers; default 6 for a model with visn_fc, else 3",
  "heads": "of BERT; default width / 64, or what a config.json beside the file says",
  "vision_heads": "of the image encoder; the same",
  "text_layers": "of a BERT that become the text encoder; default 6",
  "fusion_layers": "that run; default 6",
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "source",
    help="mPLUG .pth, ModelScope .bin, DeepSpeed folder, CLIP .pt, BERT, or .safetensors of one of "
    "these",
  )
  parser.add_argument("dest", help="folder to create, or one file: .safetensors")
  parser.add_argument(
    "--image_size",
    type=int,
    default=0,
    help="pixels to resize the position tables to; 0: as they are",
  )
  parser.add_argument(
    "--dtype",
    choices=["float32", "bfloat16", "float16"],
    help="of the result; default: each tensor's own",
  )
  parser.add_argument(
    "--zero_positions",
    action="store_true",
    help="zero position tables, as the official start from CLIP has them",
  )
  parser.add_argument(
    "--keep_dead",
    action="store_true",
    help="keep unused tensors too, for a later export",
  )
  parser.add_argument(
    "--verbose",
    action="store_true",
    help="print a line per tensor: its destination, or why it was dropped",
  )
  for name, text in _FIELDS.items():
    parser.add_argument(f"--{name}", type=int, help=text)
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status: 0, or 1 after a one-line error on stderr."""
  options = vars(_parse(argv))
  verbose, dest = options.pop("verbose"), options.pop("dest")
  given = {name: value for name in _FIELDS if (value := options.pop(name)) is not None}
  try:
    manifest = importer.convert_checkpoint(options.pop("source"), dest, **options, **given)
  except (ValueError, OSError, ImportError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  if verbose:
    print("\n".join(manifest_lib.tensor_lines(manifest)))
  print("\n".join(manifest_lib.summary(manifest)))
  print(f"geometry: {', '.join(f'{name}={value}' for name, value in manifest['geometry'].items())}")
  location = f"in the metadata of {dest}" if storage.is_file(dest) else f"{dest}/manifest.json"
  print(f"manifest: {location}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
