"""Exports PyTorch weights: `python -m tools.export_torch CHECKPOINT DEST.pth`, official names."""

import argparse
import sys
from collections.abc import Sequence

from mplug_jax.checkpoints import errors
from mplug_jax.conversion import exporter, official_inventory
from mplug_jax.conversion import manifest as manifest_lib


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("checkpoint", help="folder or file of convert_checkpoint, or a run folder")
  parser.add_argument("dest", help="file to create, .pth or .safetensors")
  parser.add_argument(
    "--task",
    default="",
    choices=["", *official_inventory.TASKS],
    help="task of the official model; default: that of the source or run",
  )
  parser.add_argument("--slim", action="store_true", help="omit unused tensors")
  parser.add_argument(
    "--dtype",
    choices=["float32", "bfloat16", "float16"],
    help="dtype; default: that of each source tensor",
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="replace a file that is no earlier export"
  )
  parser.add_argument(
    "--allow_nonfinite",
    action="store_true",
    help="export values that are NaN or infinite instead of refusing them",
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the tool; returns 0, or 1 after one sentence on stderr."""
  options = vars(_parse(argv))
  dest = options.pop("dest")
  try:
    manifest = exporter.export_torch(options.pop("checkpoint"), dest, **options)
  except (ValueError, OSError, errors.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print("\n".join(manifest_lib.summary(manifest)))
  print(f"manifest: {manifest_lib.manifest_beside(dest)}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
