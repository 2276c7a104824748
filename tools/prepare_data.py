"""Prepares and checks data before training.

    python -m tools.prepare_data vqa_v2 --root=/data/vqa

reads a data set as it is distributed, loose files or the original zip files, writes the annotation
files that training reads (all or none), and prints the commands that use them. docs/data.md lists
the files expected under --root for every data set.

    python -m tools.prepare_data check FILE --task=vqa

reads your own data, or prepared data, completely and reports what training would encounter. FILE is
an annotation file in any format (.json, .jsonl, .csv, .tsv, .parquet), or a folder with the images
in train/, val/ and test/ and their captions in the same folders. The report has counts, missing and
corrupt images, duplicate ids, empty texts, lengths, answers or labels, boxes outside their image,
overlap with other files, and what the reader noted: skipped files, repeated keys, texts that are no
valid Unicode.

    python -m tools.prepare_data shards PATTERN --out=FOLDER
    python -m tools.prepare_data tfds --task=vqa --data=jsonl:FILE --out=DATA_DIR

write the image-text pairs of tar shards as ArrayRecord files, and any data as a TensorFlow Datasets
set: docs/shards.md.

Exit status: 0 training can start, perhaps with warnings; 1 it would fail, or nothing was written;
2 wrong arguments, or the sheet could not be written.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from mplug_jax.config import Config
from mplug_jax.config.presets import PRESETS
from mplug_jax.data import check as check_lib
from mplug_jax.data import prepare as data_prepare
from mplug_jax.data.check import report as report_lib
from mplug_jax.data.check import sheet
from mplug_jax.data.prepare import array_record
from mplug_jax.data.storage import shards as shards_lib
from mplug_jax.data.text import sentencepiece, unicode, wordpiece
from mplug_jax.data.text import tokenizer as tokenizer_lib
from mplug_jax.data.text.tokenizer_base import Tokenizer
from mplug_jax.reporting import sample_sheet

TASKS = ("vqa", "caption", "retrieval", "grounding", "nlvr2", "snli_ve", "pretrain")
_NAMED = 20  # bad pairs named in the output


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest="command", required=True)
  _add_check(commands)
  _add_shards(commands)
  _add_tfds(commands)
  for name, dataset in data_prepare.DATASETS.items():
    _add_dataset(commands, name, dataset)
  options = parser.parse_args(argv)
  if options.command == "shards" and min(options.records_per_shard, options.workers) < 1:
    parser.error("--records_per_shard and --workers must be at least 1.")
  if options.command != "check":
    return options
  if options.limit < 0:
    parser.error(f"--limit={options.limit} must be at least 0.")
  if options.labels and options.task not in ("nlvr2", "snli_ve"):
    parser.error(f"--labels applies to nlvr2 and snli_ve, not to {options.task}.")
  return options


def _add_check(commands: argparse._SubParsersAction) -> None:
  """Adds the command that checks data."""
  check = commands.add_parser(
    "check",
    help="read everything and report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  check.add_argument("file", metavar="FILE")
  check.add_argument(
    "--task", required=True, choices=TASKS, help="task whose config and source read FILE"
  )
  check.add_argument(
    "--data",
    default="jsonl",
    metavar="NAME",
    help="config argument data=, for official formats",
  )
  check.add_argument(
    "--split",
    default="train",
    choices=("train", "val", "test"),
    help="split to check; only train requires answers, boxes and labels",
  )
  check.add_argument(
    "--size", default="small", choices=PRESETS, help="size of the config, which sets the limits"
  )
  check.add_argument(
    "--image_root",
    default="",
    metavar="DIR",
    help="folder or archive of the images; default: the folder of FILE",
  )
  check.add_argument("--fields", default="", metavar="KEY=NAME,...", help="config.data.fields")
  check.add_argument(
    "--labels", default="", metavar="A/B/...", help="classes, for nlvr2 and snli_ve"
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
    help="other files, which should share no image and no id with FILE",
  )
  check.add_argument(
    "--sheet",
    default="",
    metavar="FILE.png",
    help="write a figure of some images with their texts",
  )
  check.add_argument(
    "--limit", type=int, default=0, help="maximum number of records, evenly spaced; 0: all"
  )


def _add_shards(commands: argparse._SubParsersAction) -> None:
  """Adds the command that converts tar shards to ArrayRecord."""
  shards_parser = commands.add_parser(
    "shards",
    help="tar shards to ArrayRecord",
    description=(
      "Write the image-text pairs of tar shards as ArrayRecord files, for random access; "
      "an interrupted command resumes."
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
    help="processes; default: one per core",
  )
  shards_parser.add_argument(
    "--verify", action="store_true", help="decode every image and drop those that cannot be decoded"
  )


def _add_tfds(commands: argparse._SubParsersAction) -> None:
  """Adds the command that writes a TensorFlow Datasets set."""
  tfds_parser = commands.add_parser(
    "tfds",
    help="write a TensorFlow Datasets set",
    description="Write data as a TensorFlow Datasets set.",
  )
  tfds_parser.add_argument(
    "--task",
    required=True,
    choices=("caption", "vqa", "grounding"),
    help="task whose config and source read the data",
  )
  tfds_parser.add_argument(
    "--data",
    default="jsonl",
    metavar="ARG",
    help="config argument data= and others, as jsonl:FILE,root=IMAGES",
  )
  tfds_parser.add_argument(
    "--splits", nargs="+", default=["train", "val"], choices=("train", "val", "test")
  )
  tfds_parser.add_argument("--out", required=True, metavar="DATA_DIR")


def _add_dataset(
  commands: argparse._SubParsersAction, name: str, dataset: data_prepare.Dataset
) -> None:
  """Adds the command that prepares the data set `name`."""
  description = f"{dataset.summary} See docs/data.md."
  command = commands.add_parser(name, help=dataset.summary, description=description)
  command.add_argument(
    "--root", required=True, metavar="DIR", help="folder of the downloaded files"
  )
  command.add_argument(
    "--out",
    default="",
    metavar="DIR",
    help="output folder; default: see docs/data.md, mostly --root",
  )
  command.add_argument("--overwrite", action="store_true", help="replace existing files")
  command.add_argument(
    "--skip_missing",
    action="store_true",
    help="drop annotations of missing images",
  )
  with_authors = [name for name, other in data_prepare.DATASETS.items() if other.split_by]
  command.add_argument(
    "--split_by",
    default="",
    choices=("", *dataset.split_by),
    help=f"author of the splits, for {', '.join(with_authors)}",
  )
  command.set_defaults(name=name)


def _config(options: argparse.Namespace, file: str, split: str) -> Config:
  """Returns the task's config with `file` as its split.

  Raises:
    ValueError: the task has no such data.
  """
  if shards_lib.is_pattern(file):
    raise ValueError(f"{file} names shards, which the command shards --verify checks.")
  is_folder = os.path.isdir(file)
  argument = [options.size, f"data={'folder' if is_folder else options.data}"]
  if options.labels:
    argument.append(f"labels={options.labels}")
  module = importlib.import_module(f"configs.{options.task}")
  config = module.get_config(",".join(argument)).unlock()
  data = config.data
  data.fields = options.fields
  root = options.image_root or (file if is_folder else os.path.dirname(file) or ".")
  for key in [key for key in data if key.endswith("_root")]:
    data[key] = os.path.join(root, data[key])  # some are subfolders of it
  if not is_folder:
    data.update({"train_files": (file,)} if split == "train" else {f"{split}_file": file})
  return config


def _tokenizer(path: str) -> Tokenizer:
  """Loads a tokenizer; raises ValueError or FileNotFoundError."""
  if os.path.isdir(path):
    return tokenizer_lib.load(path)
  if path.endswith(".model"):
    return sentencepiece.SentencePieceTokenizer(path)
  return wordpiece.WordPieceTokenizer(path)


def check(options: argparse.Namespace) -> int:
  """Runs the command `check`; returns the exit status."""
  try:
    if options.sheet and os.path.exists(options.sheet) and not sample_sheet.is_sheet(options.sheet):
      raise FileExistsError(
        f"--sheet={options.sheet} exists and is no sheet of this command; choose another file."
      )
    config = _config(options, options.file, options.split)
    others = [(name, _config(options, name, "val"), "val") for name in options.against]
    tokenizer = _tokenizer(options.tokenizer) if options.tokenizer else None
    report = check_lib.check(config, options.split, tokenizer, others, options.limit)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print(f"{options.file}, read as {config.data.name} for {options.task}")
  print(unicode.printable("\n".join(report_lib.lines(report))))
  if options.sheet:
    try:
      written = sheet.write_sheet(report, options.sheet, config.data.frames)
    except OSError as error:
      print(f"error: the sheet could not be written: {error}", file=sys.stderr)
      return 2
    print(f"sheet     {options.sheet if written else 'none, because no image can be read'}")
  return 1 if report.errors else 0


def prepare(options: argparse.Namespace) -> int:
  """Runs the command that prepares a data set; returns the exit status."""
  try:
    lines = data_prepare.prepare(
      options.name,
      options.root,
      options.out,
      options.overwrite,
      options.skip_missing,
      options.split_by,
    )
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print("\n".join(lines))
  return 0


def shards(options: argparse.Namespace) -> int:
  """Runs the command `shards`; returns the exit status."""

  def print_shard(shard: array_record.Shard) -> None:
    bad = f", {shard.bad:,} bad" if shard.bad else ""
    print(f"{shard.name}.array_record  {shard.pairs:,} pairs{bad}", flush=True)

  try:
    written, left_out = array_record.convert(
      options.patterns,
      options.out,
      options.records_per_shard,
      options.workers,
      options.verify,
      print_shard,
    )
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  sentences = [*left_out, *(sentence for shard in written for sentence in shard.named)]
  for sentence in sentences[:_NAMED]:
    print(unicode.printable(f"  {sentence}"))
  pairs = sum(shard.pairs for shard in written)
  bad = sum(shard.bad for shard in written)
  print(f"{pairs:,} pairs in {len(written):,} files, {bad:,} bad pairs left out")
  print("train on them with")
  print(
    "  python -m mplug_jax.main "
    f"--config='configs/pretrain.py:data=shards:{options.out}/*.array_record' "
    "--config.data.test_file=..."
  )
  return 0 if pairs else 1


def tfds(options: argparse.Namespace) -> int:
  """Runs the command `tfds`; returns the exit status."""
  from mplug_jax.data.prepare import tfds as tfds_builders

  try:
    module = importlib.import_module(f"configs.{options.task}")
    config = module.get_config(f"small,data={options.data}")
    name, examples = tfds_builders.prepare(options.task, config.data, options.splits, options.out)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  counts = ", ".join(f"{split} {count:,}" for split, count in examples.items())
  print(f"{name}: {counts}")
  print("train on it with")
  config_name = f"configs/{options.task}.py:data=tfds:{name},root={options.out}"
  print(f"  python -m mplug_jax.main --config={config_name}")
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  options = _parse(argv)
  commands = {"check": check, "shards": shards, "tfds": tfds}
  return commands.get(options.command, prepare)(options)


if __name__ == "__main__":
  sys.exit(main())
