"""Data before training.

    python -m tools.prepare_data vqa_v2 --root=/data/vqa

reads a data set as it is distributed, loose files or the zip files they come in, writes the annotation files that training reads (all of
them, or none), and prints the commands that read them. docs/data.md says for every NAME which files it expects under --root.

    python -m tools.prepare_data check FILE --task=vqa

reads all of one's own data, or of what was written, and says what training would meet. FILE is an annotation file in any format (.json,
.jsonl, .csv, .tsv, .parquet), or a folder with train/, val/ and test/ full of images with their captions beside them.
Reported are counts, missing and corrupt images, duplicate ids, empty texts, lengths, answers or labels, boxes outside their image, and
what other files share with this one.

    python -m tools.prepare_data shards PATTERN --out=FOLDER
    python -m tools.prepare_data tfds --task=vqa --data=jsonl:FILE --out=DATA_DIR

write the image-text pairs of tar shards as ArrayRecord, and any data as a set of TensorFlow Datasets: docs/shards.md.

Exit status: 0 training can begin, whatever the warnings say; 1 it would fail, or nothing was written; 2 wrong arguments, or the sheet
could not be written.
"""

import argparse
import importlib
import os
import sys

from mplug_jax.config.presets import PRESETS
from mplug_jax.data import check as check_lib
from mplug_jax.data import prepare as data_prepare
from mplug_jax.data.check import report as report_lib
from mplug_jax.data.check import sheet
from mplug_jax.data.prepare import array_record, refcoco
from mplug_jax.data.storage import shards as shards_lib
from mplug_jax.data.text import sentencepiece, wordpiece
from mplug_jax.data.text import tokenizer as tokenizer_lib

TASKS = ("vqa", "caption", "retrieval", "grounding", "nlvr2", "snli_ve", "pretrain")
_NAMED = 20  # bad pairs that are named


def _parse(argv):
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest="command", required=True)
  check = commands.add_parser(
    "check",
    help="read everything and report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  check.add_argument("file", metavar="FILE")
  check.add_argument("--task", required=True, choices=TASKS, help="whose config and source read it")
  check.add_argument(
    "--data",
    default="jsonl",
    metavar="NAME",
    help="the config argument data=: the format, where it is an official one",
  )
  check.add_argument(
    "--split",
    default="train",
    choices=("train", "val", "test"),
    help="only of train are answers, boxes, labels needed",
  )
  check.add_argument(
    "--size", default="small", choices=PRESETS, help="of the config that sets the limits"
  )
  check.add_argument(
    "--image_root",
    default="",
    metavar="DIR",
    help="folder or archive of the images; default: the folder of FILE",
  )
  check.add_argument("--fields", default="", metavar="OURS=THEIRS,...", help="config.data.fields")
  check.add_argument(
    "--labels", default="", metavar="A/B/...", help="the classes, for nlvr2 and snli_ve"
  )
  check.add_argument(
    "--tokenizer",
    default="",
    metavar="PATH",
    help="vocab.txt, a SentencePiece .model, or the tokenizer folder of a run",
  )
  check.add_argument(
    "--against",
    nargs="+",
    default=[],
    metavar="FILE",
    help="other files, that should share no image and no id",
  )
  check.add_argument(
    "--sheet",
    default="",
    metavar="FILE.png",
    help="write a picture of some images with their texts",
  )
  check.add_argument(
    "--limit", type=int, default=0, help="read at most so many records, evenly spaced; 0: all"
  )
  _add_writers(commands)
  for name, recipe in data_prepare.RECIPES.items():
    _add_recipe(commands, name, recipe)
  options = parser.parse_args(argv)
  if options.command == "shards" and min(options.records_per_shard, options.workers) < 1:
    parser.error("--records_per_shard and --workers must be at least 1.")
  if options.command != "check":
    return options
  if options.limit < 0:
    parser.error(f"--limit={options.limit} must be at least 0.")
  if options.labels and options.task not in ("nlvr2", "snli_ve"):
    parser.error(f"--labels are those of nlvr2 and snli_ve, not of {options.task}.")
  return options


def _add_writers(commands):
  """The commands that write data in other formats."""
  shards_parser = commands.add_parser(
    "shards",
    help="tar shards to ArrayRecord",
    description=(
      "Write the image-text pairs of tar shards as ArrayRecord, for reading at random; a command that was interrupted goes on."
    ),
  )
  shards_parser.add_argument(
    "patterns",
    nargs="+",
    metavar="PATTERN",
    help="tars: paths, '*.tar', '{00000..00331}.tar', gs://...",
  )
  shards_parser.add_argument("--out", required=True, metavar="FOLDER")
  shards_parser.add_argument("--records_per_shard", type=int, default=10_000, metavar="N")
  shards_parser.add_argument(
    "--workers",
    type=int,
    default=os.cpu_count(),
    metavar="N",
    help="processes; default: one a core",
  )
  shards_parser.add_argument(
    "--verify", action="store_true", help="decode every image, and leave out those that cannot be"
  )
  tfds_parser = commands.add_parser(
    "tfds",
    help="a set of TensorFlow Datasets",
    description="Write data as a set of TensorFlow Datasets.",
  )
  tfds_parser.add_argument(
    "--task",
    required=True,
    choices=("caption", "vqa", "grounding"),
    help="whose config and source read it",
  )
  tfds_parser.add_argument(
    "--data",
    default="jsonl",
    metavar="ARG",
    help="the config argument data=, and others: jsonl:FILE,root=IMAGES",
  )
  tfds_parser.add_argument(
    "--splits", nargs="+", default=["train", "val"], choices=("train", "val", "test")
  )
  tfds_parser.add_argument("--out", required=True, metavar="DATA_DIR")


def _add_recipe(commands, name, recipe):
  """The command that prepares the data set `name`."""
  summary = recipe.__doc__.splitlines()[0]
  command = commands.add_parser(name, help=summary, description=f"{summary} See docs/data.md.")
  command.add_argument("--root", required=True, metavar="DIR", help="folder of what was downloaded")
  command.add_argument(
    "--out",
    default="",
    metavar="DIR",
    help="where to write; default: see docs/data.md, mostly --root",
  )
  command.add_argument("--overwrite", action="store_true", help="replace files that are there")
  command.add_argument(
    "--skip_missing",
    action="store_true",
    help="leave out what is said of images that are not there",
  )
  splits = ("", *refcoco.SPLIT_BY) if recipe is refcoco.refcoco else ("",)
  command.add_argument(
    "--split_by", default="", choices=splits, help="of refcoco, refcoco+ and refcocog: whose splits"
  )
  command.set_defaults(name=name)


def _config(options, file, split):
  """The task's config with `file` as its split. Raises ValueError: the task has no such data."""
  if shards_lib.is_pattern(file):
    raise ValueError(f"{file} names shards, which the command shards --verify checks.")
  is_folder = os.path.isdir(file)
  argument = [options.size, f"data={'folder' if is_folder else options.data}"] + [
    f"labels={options.labels}"
  ] * bool(options.labels)
  config = (
    importlib.import_module(f"configs.{options.task}").get_config(",".join(argument)).unlock()
  )
  data = config.data
  data.fields = options.fields
  root = options.image_root or (file if is_folder else os.path.dirname(file) or ".")
  for key in [key for key in data if key.endswith("_root")]:
    data[key] = os.path.join(root, data[key])  # some are folders below it
  if not is_folder:
    data.update({"train_files": (file,)} if split == "train" else {f"{split}_file": file})
  return config


def _tokenizer(path):
  """Raises ValueError, FileNotFoundError."""
  if os.path.isdir(path):
    return tokenizer_lib.load(path)
  return (
    sentencepiece.SentencePieceTokenizer
    if path.endswith(".model")
    else wordpiece.WordPieceTokenizer
  )(path)


def check(options):
  """Runs the command `check`; returns the exit status."""
  try:
    config = _config(options, options.file, options.split)
    others = [(name, _config(options, name, "val"), "val") for name in options.against]
    tokenizer = _tokenizer(options.tokenizer) if options.tokenizer else None
    report = check_lib.check(config, options.split, tokenizer, others, options.limit)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"{options.file}, read as {config.data.name} for {options.task}")
  print("\n".join(report_lib.lines(report)))
  if options.sheet:
    try:
      written = sheet.write_sheet(report, options.sheet, config.data.frames)
    except OSError as error:
      print(f"error: the sheet could not be written: {error}", file=sys.stderr)
      return 2
    print(f"sheet     {options.sheet if written else 'none, for no image can be read'}")
  return 1 if report.errors else 0


def prepare(options):
  """Runs the command that prepares a data set; returns the exit status."""
  try:
    lines = data_prepare.prepare(options)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print("\n".join(lines))
  return 0


def shards(options):
  """Runs the command `shards`; returns the exit status."""

  def say(shard):
    print(
      f"{shard.name}.array_record  {shard.pairs:,} pairs"
      + f", {shard.bad:,} bad" * bool(shard.bad),
      flush=True,
    )

  try:
    written, left_out = array_record.convert(
      options.patterns, options.out, options.records_per_shard, options.workers, options.verify, say
    )
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  for sentence in [*left_out, *(sentence for shard in written for sentence in shard.named)][
    :_NAMED
  ]:
    print(f"  {sentence}")
  pairs, bad = (sum(getattr(shard, name) for shard in written) for name in ("pairs", "bad"))
  print(
    f"{pairs:,} pairs in {len(written):,} files, {bad:,} bad ones left out\ntrain on them with\n"
    f"  python -m mplug_jax.main --config='configs/pretrain.py:data=shards:{options.out}/*.array_record' --config.data.test_file=..."
  )
  return 0 if pairs else 1


def tfds(options):
  """Runs the command `tfds`; returns the exit status."""
  from mplug_jax.data.prepare import tfds as tfds_builders

  try:
    config = importlib.import_module(f"configs.{options.task}").get_config(
      f"small,data={options.data}"
    )
    name, examples = tfds_builders.prepare(options.task, config.data, options.splits, options.out)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(
    f"{name}: "
    + ", ".join(f"{split} {count:,}" for split, count in examples.items())
    + "\ntrain on it with\n"
    f"  python -m mplug_jax.main --config=configs/{options.task}.py:data=tfds:{name},root={options.out}"
  )
  return 0


def main(argv=None):
  """Returns the exit status."""
  options = _parse(argv)
  return {"check": check, "shards": shards, "tfds": tfds}.get(options.command, prepare)(options)


if __name__ == "__main__":
  sys.exit(main())
