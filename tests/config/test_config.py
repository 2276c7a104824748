"""Configs: arguments, error messages, command lines, and building without JAX."""

import itertools
import json
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import ml_collections
import pytest

from mplug_jax import config as config_lib
from mplug_jax.config.presets import PRESETS
from mplug_jax.data.text import wordpiece
from mplug_jax.training import loop
from tests.support import tiny_run, word_list

CONFIGS = sorted((tiny_run.ROOT / "configs").glob("[!_]*.py"))


def run(*args, **kwargs):
  return subprocess.run(
    [sys.executable, *args],
    cwd=tiny_run.ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    **kwargs,
  )


def plain_leaves(value):
  """Returns all values inside dicts, lists and tuples."""
  if isinstance(value, dict | ml_collections.ConfigDict):
    return [x for v in value.values() for x in plain_leaves(v)]
  if isinstance(value, list | tuple):
    return [x for v in value for x in plain_leaves(v)]
  return [value]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_size_and_source_builds_a_locked_config(path):
  module = runpy.run_path(str(path))
  required = module.get("REQUIRED", "")

  def get_config(arg=""):
    return module["get_config"](",".join(filter(None, (arg, required))))

  for size, data, rest in itertools.product(
    PRESETS, module["SOURCES"], ("", "res=224,steps=7,black_images")
  ):
    arg = ",".join(filter(None, (size, f"data={data}", rest)))
    c = get_config(arg)
    assert c.is_locked
    assert {type(x) for x in plain_leaves(c)} <= {int, float, str, bool}, arg
    with pytest.raises((AttributeError, KeyError)):
      c.optim.lrr = 1.0
    assert c.data.name == data
    assert c.model.patch_size == PRESETS[size]["patch_size"]
    assert c.total_steps or c.total_epochs, arg
    if rest:
      assert (c.model.image_size, c.total_steps, c.data.black_images) == (224, 7, True)
    assert config_lib.from_json(config_lib.to_json(c)).to_dict().keys() == c.to_dict().keys()
    assert json.loads(config_lib.to_json(c))["model"]["hidden_size"] == c.model.hidden_size
  assert get_config().to_dict() == get_config("small").to_dict()


USER_FILES = [
  path
  for path in CONFIGS
  if path.stem == "caption_scst" or "jsonl" in runpy.run_path(str(path))["SOURCES"]
]


@pytest.mark.parametrize("path", USER_FILES, ids=lambda p: p.stem)
def test_user_files_are_one_argument(path, tmp_path):
  def files(arg):
    data = module["get_config"](
      ",".join(filter(None, ("tiny", arg, module.get("REQUIRED", ""))))
    ).data
    return (
      [
        name.removeprefix(f"{tmp_path}/")
        for name in (*data.train_files, data.val_file, data.test_file)
      ],
      data.name,
      data.image_root,
    )

  module = runpy.run_path(str(path))
  assert files(f"data=jsonl,root={tmp_path}") == (
    ["train.jsonl", "val.jsonl", "test.jsonl"],
    "jsonl",
    str(tmp_path),
  )
  for name in (
    "train.parquet",
    "train.csv",
    "val.tsv",
    "test.json.gz",
    "my_train.csv",
    "my_val.csv",
    "my_val.jsonl",
    "my_test.tsv",
  ):
    (tmp_path / name).write_text("")
  assert files(f"data=jsonl,root={tmp_path}") == (
    ["train.csv", "val.tsv", "test.json.gz"],
    "jsonl",
    str(tmp_path),
  )
  mine = ["my_train.csv", "my_val.csv", "my_test.tsv"]
  assert files(f"data=jsonl:{tmp_path}/my_train.csv") == (mine, "jsonl", str(tmp_path))
  assert files(f"data=jsonl:{tmp_path}/my_train.csv,root=/photos.zip") == (
    mine,
    "jsonl",
    "/photos.zip",
  )
  assert files(f"data=jsonl:{tmp_path}/all.json.gz") == (
    ["all.json.gz", "val.tsv", "test.json.gz"],
    "jsonl",
    str(tmp_path),
  )
  assert files("data=jsonl:train.xyz") == (["train.xyz", "./val.xyz", "./test.xyz"], "jsonl", ".")
  for arg in ("data=scenes:/x", "data=jsonl:"):
    with pytest.raises(
      ValueError,
      match="must be data=jsonl:FILE, data=folder:FOLDER, data=shards:PATTERN or data=tfds:NAME",
    ):
      files(arg)


def test_image_folder_is_one_argument():
  for name in ("caption", "retrieval", "pretrain"):
    module = runpy.run_path(str(tiny_run.ROOT / "configs" / f"{name}.py"))
    for arg in ("data=folder,root=/my/images", "data=folder:/my/images"):
      data = module["get_config"](arg).data
      assert (data.name, data.image_root, "train_files" in data) == ("folder", "/my/images", False)
  with pytest.raises(ValueError, match="data='folder' is unknown; there are easy_vqa"):
    tiny_run.config("data=folder:/x")


def test_size_selects_the_recipe():
  paper = tiny_run.config("base,data=vqa_v2,root=/r")
  assert (paper.batch_size, paper.total_epochs, paper.model.image_size, paper.task.beams) == (
    1024,
    8,
    384,
    5,
  )
  assert paper.optim.schedule.to_dict() == {
    "name": "official",
    "epochs": 8,
    "warmup_units": 4,
    "warmup_lr": 1e-5,
    "min_lr": 1e-6,
  }
  assert paper.data.train_files == ("/r/vqa_train.json", "/r/vg_qa.json")
  assert paper.data.vg_root == "/r/vg"
  assert tiny_run.config("large,data=vqa_v2").model.remat == "full"


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    (
      "bogus",
      "'bogus' is unknown. First a size, tiny, small, base, large, huge; "
      "then any of black_images=False, data=easy_vqa, ",
    ),
    ("tiny,color=red", "'color=red' is unknown"),
    ("res=224,tiny", "'tiny' is unknown. First a size"),
    ("size=giant", "The size 'giant' is unknown; there are tiny, small, base, large, huge."),
    ("tiny,res=big", "res='big' must be a whole number"),
    ("tiny,black_images=1", "black_images='1' must be true or false"),
    ("data=coco", "data='coco' is unknown; there are easy_vqa, scenes, vqa_v2, jsonl"),
  ],
)
def test_wrong_argument_lists_valid_ones(arg, message):
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    tiny_run.config(arg)
  assert "\n" not in str(error.value)


def test_parse_arg():
  arg = config_lib.parse_arg(" large , lr=1e-4, n=3,flag", lr=0.1, n=1, flag=False, name="x")
  assert arg.to_dict() == {"size": "large", "lr": 1e-4, "n": 3, "flag": True, "name": "x"}
  assert config_lib.parse_arg("flag=False,name=a=b", flag=True, name="").to_dict() == {
    "size": "small",
    "flag": False,
    "name": "a=b",
  }
  assert config_lib.parse_arg(None).to_dict() == {"size": "small"}
  with pytest.raises(ValueError, match="lr='fast' must be a number"):
    config_lib.parse_arg("lr=fast", lr=0.1)


WRONG_COMMAND_LINES = [
  ([], "--config=configs/vqa.py or another file of configs/ is needed; --help lists the flags."),
  (
    ["--config=configs/nothing.py"],
    "The config configs/nothing.py does not exist. "
    "Name a file, or one of the packaged configs: caption, ",
  ),
  (
    ["--config=configs/vqa.py:tiny,data=coco"],
    "The config argument data='coco' is unknown; "
    "there are easy_vqa, scenes, vqa_v2, jsonl, gqa, tfds.",
  ),
  (
    ["--config=configs/vqa.py", "--config.optim.lr=1", "--config.optim.lrr=1"],
    "--config.optim.lrr=1: config.optim has no key 'lrr'; "
    "it has accumulate, b1, b2, clip, eps, groups, lr, ",
  ),
  (
    ["--config", "configs/vqa.py", "--config.optm.lr", "1"],
    "--config.optm.lr: config has no key 'optm'; it has batch_size, ",
  ),
  (
    ["--config=configs/vqa.py", "--config.seed.x=1"],
    "--config.seed.x=1: config.seed is a value and has no keys.",
  ),
  (
    ["--config=configs/vqa.py", "--config.optim.lr=fast"],
    "flag --config.optim.lr=fast: could not convert string to float: 'fast'",
  ),
  (
    ["--config=configs/vqa.py", "--wrkdir=x"],
    "Unknown command line flag 'wrkdir'. Did you mean: workdir ?",
  ),
  (
    ["--config=configs/vqa.py", "--mode=test"],
    "flag --mode=test: value should be one of <train|evaluate>",
  ),
  (["--config=configs/vqa.py", "extra"], "Unknown argument 'extra'; --help lists the flags."),
]
PRINTED = ("configs/vqa.py:tiny", "vqa:tiny")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
  """{arguments of `python -m mplug_jax.main`: (status, stdout, stderr, was JAX imported)}."""
  mine = tmp_path_factory.mktemp("configs") / "mine.py"
  mine.write_text("def get_config():\n  return None.lr\n")
  lines = [arguments for arguments, _ in WRONG_COMMAND_LINES]
  lines += [[f"--config={name}", "--config.seed=7", "--print_config"] for name in PRINTED]
  lines.append([f"--config={mine}", "--config.lr=1"])
  result = run("-m", "tests.support.forked_mains", input=json.dumps(lines))
  assert result.returncode == 0, result.stderr
  names = [*map(tuple, lines[:-1]), "mine.py"]
  return dict(zip(names, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize(("arguments", "message"), WRONG_COMMAND_LINES)
def test_wrong_command_line_is_one_sentence(arguments, message, commands):
  status, out, err, _ = commands[tuple(arguments)]
  assert status == 1
  assert out == ""
  assert err.startswith(f"error: {message}")
  assert err.count("\n") == 1


@pytest.mark.parametrize("config", PRINTED)
def test_print_config_prints_the_resolved_config_without_jax(config, commands):
  arguments = (f"--config={config}", "--config.seed=7", "--print_config")
  status, out, err, imported = commands[arguments]
  assert status == 0, err
  assert not err
  assert not imported
  expected = tiny_run.config()
  expected.seed = 7
  assert json.loads(out) == json.loads(config_lib.to_json(expected))


def test_main_runs_as_a_script():
  result = run("-m", "mplug_jax.main", "--config=configs/vqa.py", "extra")
  assert result.returncode == 1
  assert result.stderr == "error: Unknown argument 'extra'; --help lists the flags.\n"


def test_packaged_configs_load_by_name_but_files_take_precedence(tmp_path, monkeypatch):
  packaged = config_lib.config_file("vqa")
  assert pathlib.Path(packaged) == tiny_run.ROOT / "configs" / "vqa.py"
  monkeypatch.chdir(tmp_path)
  assert config_lib.load("vqa:tiny").name == "vqa"
  (tmp_path / "vqa").write_text("")
  assert config_lib.config_file("vqa") == "vqa"
  for name in ("none", "../configs/vqa", "configs/vqa"):
    with pytest.raises(FileNotFoundError, match="packaged configs: caption, caption_scst"):
      config_lib.config_file(name)


def test_error_inside_a_config_file_keeps_its_traceback(commands):
  status, _, err, _ = commands["mine.py"]
  assert status == 1
  assert 'mine.py", line 2, in get_config' in err


def test_configs_import_no_jax():
  load = (
    "module = runpy.run_path({!r})\nmodule['get_config']('base,' + module.get('REQUIRED', ''))\n"
  )
  code = "import sys, runpy\nimport mplug_jax.config\n" + "".join(
    load.format(str(p)) for p in CONFIGS
  )
  code += "assert not {'jax', 'flax'} & sys.modules.keys()"
  result = run("-c", code)
  assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  """vocab.txt with as many lines as BERT's, which the paper's configs require."""
  path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
  path.write_text(word_list.text(*(f"word{i}" for i in range(30517))))
  return path


def test_paper_recipe_builds_without_computing(vocabulary):
  c = tiny_run.config("base,data=vqa_v2")
  built = loop.build(
    c, wordpiece.WordPieceTokenizer(vocabulary), total_steps=5000, steps_per_epoch=625
  )
  params = built.abstract.params
  assert sum(x.size for x in jax.tree.leaves(params)) == 344_683_578
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
  assert all(
    isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None
    for x in jax.tree.leaves(built.abstract)
  )
  assert sorted(built.schedules)
  assert built.task.model.dtype == "bfloat16"
  spec = built.task.batch_spec(c.batch_size)
  assert spec["image"].shape == (1024, 384, 384, 3)
  assert spec["answer"].shape == (1024, 1, 10, 12)


def test_vocabulary_of_another_size_raises(tmp_path):
  path = tmp_path / "vocab.txt"
  path.write_text(word_list.text())
  with pytest.raises(
    ValueError, match="config.model.vocab_size=30522 but the tokenizer has 5 tokens; set it to 0"
  ):
    loop.build(tiny_run.config("base"), wordpiece.WordPieceTokenizer(path))


def test_command_lines_of_earlier_versions_keep_their_meaning():
  flags = [
    "--config=vqa:tiny",
    "--config.data.easier=0.9",
    "--config.data.frame_sampling=centres",
    "--config.task.prompt_mode=mended",
    "--config.task.box_weights",
    "own",
    "--config.data.blank_image",
    "--noconfig.data.blank_image",
    "--config.seed=3",
    "--workdir=runs/config.data.easier=1",
  ]
  assert config_lib.resolve_config_flag(flags)[1:] == [
    "--config.data.easy_fraction=0.9",
    "--config.data.frame_sampling=uniform",
    "--config.task.prompt_mode=standard",
    "--config.task.box_weights",
    "per_example",
    "--config.data.black_images",
    "--noconfig.data.black_images",
    "--config.seed=3",
    "--workdir=runs/config.data.easier=1",
  ]
  assert tiny_run.config("tiny,blank=true").data.black_images
