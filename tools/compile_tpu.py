"""Compiles a run for TPUs that are not there: does it fit, what bounds its speed, what would be better?

    python -m tools.compile_tpu --config=configs/pretrain.py:large --topology=v5e:4x4
    python -m tools.compile_tpu --config=configs/caption.py:base --topology=v5e:1x1 --fn=generate --batch=16
    python -m tools.compile_tpu --config=configs/pretrain.py:large --topology=v5e:8x8 --plan

Needs the TPU compiler, pip install -e ".[tpu]", and neither a TPU nor data nor a vocabulary. Takes the flags of mplug_jax.main. Nothing
is executed: times are what the chip's published rates allow. Exit status: 0 it fits, 3 it does not, 2 there is no TPU compiler, 1 the
command is wrong.
"""

import json
import os
import sys

from mplug_jax.performance.tpu import topology

os.environ.update(
  {name: os.environ.get(name, value) for name, value in topology.ENVIRONMENT.items()}
)

from absl import app, flags, logging  # noqa: E402

from mplug_jax import main as command  # noqa: E402

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
  "Of the compiler; low is several times quicker, its memory traffic higher.",
)
_PLAN = flags.DEFINE_bool(
  "plan", False, "Search mesh, remat and microbatches for the fastest train step that fits."
)
_MAX_COMPILES = flags.DEFINE_integer(
  "max_compiles", 6, "How many programs --plan and proposals may compile.", lower_bound=0
)
_JSON = flags.DEFINE_string("json", "", "File that a line of json is added to.")


def main(argv):
  """Exits with the status that the module's docstring says."""
  del argv
  from mplug_jax.performance.tpu import report

  config = command.CONFIG.value
  if _BATCH.value:
    with config.unlocked():
      config.batch_size = config.eval.batch_size = _BATCH.value
  try:
    sys.exit(
      report.run(
        config, _TOPOLOGY.value, _FN.value, _EFFORT.value, _PLAN.value, _MAX_COMPILES.value, _say
      )
    )
  except topology.NoCompiler as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)


def _say(lines, row):
  """Prints a report; adds its row to the file of --json."""
  print("\n".join(lines), flush=True)
  if _JSON.value and row:
    with open(_JSON.value, "a") as file:
      file.write(
        json.dumps({"config": command.CONFIG.value.name, "command": sys.argv[1:]} | row) + "\n"
      )


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main, flags_parser=command.parse_flags)
