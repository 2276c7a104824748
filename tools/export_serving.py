"""A checkpoint as programs for servers: `python -m tools.export_serving runs/vqa served`, see mplug_jax/serving/export.py."""

import argparse
import json
import os
import sys

from mplug_jax import checkpoint, config as config_lib, sharding, tasks, train_state
from mplug_jax.serving import export


def _parse(argv):
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("checkpoint", help="run folder, or folder or file of convert_checkpoint")
  parser.add_argument("dest", help="folder to make")
  parser.add_argument("--config", default="", help="FILE:ARGUMENT, for another task than the run's, or for a converted checkpoint")
  parser.add_argument("--vocabulary", default="", help="vocab.txt of a converted checkpoint")
  parser.add_argument("--functions", default="", help="names with commas; default: all of the task")
  parser.add_argument("--platforms", default=",".join(export.PLATFORMS), help="default: %(default)s")
  return parser.parse_args(argv)
