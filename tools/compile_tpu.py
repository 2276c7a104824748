r"""Compiles a run for TPUs that are not attached: memory use, speed limits and better settings.

    python -m tools.compile_tpu --config=configs/pretrain.py:large --topology=v5e:4x4
    python -m tools.compile_tpu --config=configs/caption.py:base --topology=v5e:1x1 \
        --fn=generate --batch=16 --breakdown
    python -m tools.compile_tpu --config=configs/pretrain.py:large --topology=v5e:8x8 --plan

Needs the TPU compiler, pip install -e ".[tpu]", but no TPU, data or vocabulary. Takes the flags of
mplug_jax.main. Nothing is executed: times are lower bounds from the chip's published rates. Exit
status: 0 it fits; 3 it does not; 2 there is no TPU compiler; 1 the command is wrong.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mplug_jax.performance.tpu import topology

os.environ.update(
  {name: os.environ.get(name, value) for name, value in topology.ENVIRONMENT.items()}
)

from absl import app, flags, logging  # noqa: E402

from mplug_jax import main as command  # noqa: E402
from mplug_jax.runtime import (
  files,  # noqa: E402
  json_text,  # noqa: E402
)

_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "CHIP:SHAPE, such as " + ", ".join(topology.EXAMPLES) + ".", required=True
)
_FN = flags.DEFINE_string(
  "fn", "train", "train, generate, rerank, embed, or another predict function of the task."
)
_BATCH = flags.DEFINE_integer(
  "batch", 0, "Rows of the global batch; 0: those of the config.", lower_bound=0
)
_EFFORT = flags.DEFINE_enum(
  "effort",
  "low",
  ["low", "full"],
  "Effort of the compiler; low is several times faster but causes more memory traffic.",
)
_PLAN = flags.DEFINE_bool(
  "plan", False, "Search mesh, remat and microbatches for the fastest train step that fits."
)
_MAX_COMPILES = flags.DEFINE_integer(
  "max_compiles", 6, "Maximum number of programs compiled for --plan and proposals.", lower_bound=0
)
_BREAKDOWN = flags.DEFINE_bool(
  "breakdown", False, "Print HBM traffic and products by part of the model, direction and kind."
)
_DUMP = flags.DEFINE_string(
  "dump", "", "Folder for the program's text (program.txt) and its breakdown (breakdown.csv)."
)
_JSON = flags.DEFINE_string("json", "", "File to append a line of JSON to.")


def main(argv: Sequence[str]) -> None:
  """Compiles, prints a report and exits with the status in the module's docstring."""
  del argv
  from mplug_jax.performance.tpu import report

  config = command.CONFIG.value
  if _BATCH.value:
    with config.unlocked():
      config.batch_size = config.eval.batch_size = _BATCH.value
  try:
    files.require_own_lines(_JSON.value, ("config", "command"))
    sys.exit(
      report.run(
        config,
        _TOPOLOGY.value,
        _FN.value,
        _EFFORT.value,
        _PLAN.value,
        _MAX_COMPILES.value,
        _say,
        _BREAKDOWN.value,
        _DUMP.value,
      )
    )
  except topology.NoCompiler as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except (ValueError, FileExistsError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


def _say(lines: Sequence[str], row: Mapping[str, Any] | None) -> None:
  """Prints a report and appends its row to the file of --json."""
  print("\n".join(lines), flush=True)
  if _JSON.value and row:
    with open(_JSON.value, "a") as file:
      file.write(
        json_text.dumps({"config": command.CONFIG.value.name, "command": sys.argv[1:], **row})
        + "\n"
      )


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main, flags_parser=command.parse_flags)
