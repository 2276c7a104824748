"""Extensions need new definitions and one row in each table that lists them."""

import json
from typing import NamedTuple

import numpy as np
import pytest

from mplug_jax import data, evaluators, predict, tasks
from mplug_jax.conversion import exporter, formats, importer
from mplug_jax.conversion.formats.format import Format, Placement
from mplug_jax.data import prepare
from mplug_jax.data.images import ops
from mplug_jax.inference import methods
from mplug_jax.inference.predictor import Predictor
from mplug_jax.tensor_files import open as tensor_open
from mplug_jax.tensor_files import write
from mplug_jax.training import evaluate, loop
from tests.support import brightness, downloads, tiny_predictor, tiny_run, toy_dataset, word_list
from tools import prepare_data

_SIZES = {"vision_width": 8, "hidden_size": 8, "embed_dim": 4, "heads": 1, "vision_heads": 1}

TOY = Format(
  name="toy",
  title="a toy (toy...)",
  sign=r"toy\.",
  rows=((r"toy\.image", "vision_proj", "linear"), (r"toy\.text", "text_proj", "linear")),
  geometry=lambda shapes, given: _SIZES if "toy.image.weight" in shapes else {},
  placement=lambda keys, geometry: Placement(0),
  table_prefix="toy.",
)


def test_one_row_converts_and_exports_a_new_format(tmp_path, monkeypatch):
  monkeypatch.setattr(formats, "FORMATS", [*formats.FORMATS, TOY])
  rng = np.random.default_rng(0)
  tensors = {
    f"toy.{part}.{kind}": rng.normal(size=shape).astype(np.float32)
    for part in ("image", "text")
    for kind, shape in (("weight", (4, 8)), ("bias", (4,)))
  }
  write.save_safetensors(
    tmp_path / "toy.safetensors",
    [write.Tensor(name, x.shape, "float32", lambda x=x: x) for name, x in tensors.items()],
  )
  manifest = importer.convert_checkpoint(tmp_path / "toy.safetensors", tmp_path / "ours")
  assert {row["action"] for row in manifest["tensors"]} == {"map"}
  exporter.export_torch(tmp_path / "ours", tmp_path / "back.safetensors")
  with tensor_open.open_tensors(tmp_path / "back.safetensors") as back:
    assert set(back) == set(tensors)
    for name, x in tensors.items():
      np.testing.assert_array_equal(back[name], x)


def test_one_row_each_trains_and_evaluates_a_new_task(tmp_path, monkeypatch, drawn_start):
  module = brightness.__name__
  monkeypatch.setitem(data.EXAMPLES, "brightness", module)
  monkeypatch.setitem(tasks.TASKS, "brightness", f"{module}:BrightnessTask")
  monkeypatch.setitem(evaluators.EVALUATORS, "brightness", f"{module}:BrightnessEvaluator")
  vocabulary = tmp_path / "vocab.txt"
  vocabulary.write_text(word_list.text(*brightness.WORDS))
  sizes = {"batch_size": 8, "eval__batch_size": 8, "eval__limit": 0, "compilation_cache": ""}
  config = tiny_run.config(total_steps=2, optim__name="adamw", **sizes)
  config.task.name = config.data.examples = config.data.name = "brightness"
  with config.unlocked():
    config.data.size = 20
  config.tokenizer.kind = "wordpiece"
  config.tokenizer.path = str(vocabulary)
  run = tmp_path / "run"
  assert loop.train(config, str(run)) == 0
  result = json.loads((run / "result.json").read_text())
  assert result["step"] == 2
  assert result["metric"] == "accuracy"
  assert result["metrics"]["images"] == 20
  again = evaluate.evaluate(config, str(tmp_path / "evaluation"), str(run))
  assert again == result["metrics"]


def test_one_row_prepares_a_new_data_set(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(prepare.DATASETS, "gray", toy_dataset.GRAY)
  rows = (
    "train,1.png,how bright?,dark",
    "train,2.png,how bright?,light",
    "train,none.png,how bright?,light",
    "val,3.png,is it gray?,yes",
  )
  downloads.write(tmp_path, {"gray.txt": "".join(f"{row}\n" for row in rows)})
  for number in (1, 2, 3):
    downloads.write(tmp_path, {f"pictures/{number}.png": downloads.picture(number)})
  downloads.refused("gray", tmp_path, "1 of the pictures of Gray are missing", "--skip_missing")
  printed = downloads.prepare("gray", tmp_path, "--skip_missing")
  assert f"wrote {tmp_path}/train.jsonl: 2 questions" in printed
  (config,) = downloads.configs(printed)  # of the printed command
  train, val = downloads.records(config, "train", "val")
  assert [record["questions"][0]["answers"] for record in train] == [["dark"], ["light"]]
  assert [record["image"] for record in val] == [f"{tmp_path}/pictures/3.png"]
  assert ops.decode_image(val[0]["image"]).shape == (24, 32, 3)
  with pytest.raises(SystemExit):
    prepare_data.main(["--help"])
  assert toy_dataset.GRAY.summary in capsys.readouterr().out


class Count(NamedTuple):
  words: int
  pixels: int


def count(predictor, images, texts, *, truncate=False):
  """A method of Predictor: numbers of tokens and of pixels."""
  tokens = predictor.text_rows("count")(texts, truncate)
  pixels = predictor.image_rows("count", images)["image"]
  return [
    Count(int((row != predictor.tokenizer.pad_id).sum()), image.size)
    for row, image in zip(tokens, pixels, strict=True)
  ]


COUNT = methods.Method(
  verb="count words and pixels",
  task="vqa",
  trained=("vqa",),
  parts=("text_encoder",),
  config="configs/vqa.py",
  text=methods.Text("title", "max_question"),
  command=methods.Command("count", "photo", "title"),
)


def test_one_row_adds_a_method_to_the_predictor_and_the_command(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(methods.METHODS, "count", COUNT)
  monkeypatch.setattr(Predictor, "count", count, raising=False)
  predictor = tiny_predictor.predictor(tmp_path / "tokenizer", "vqa")
  size = predictor.config.model.image_size
  photo = tiny_predictor.photograph(tmp_path / "wide.png", 96, 48)
  assert predictor.can("count")
  assert not tiny_predictor.predictor(tmp_path / "other", "caption").can("count")
  expected = predictor.count([photo], ["a red circle"])
  assert expected[0].words > 3
  assert expected[0].pixels == size * size * 3

  monkeypatch.setattr(Predictor, "load", lambda *args, **options: predictor)
  rows = tmp_path / "rows.jsonl"
  titles = ("a red circle", "", "no")
  rows.write_text("".join(json.dumps({"photo": photo.name, "title": x}) + "\n" for x in titles))
  assert predict.main(["--checkpoint=run", "--task=count", f"--input={rows}"]) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert lines[0] == {"photo": photo.name, "title": titles[0], **expected[0]._asdict()}
  assert "The title '' is empty" in lines[1]["error"]
  assert lines[2]["words"] < lines[0]["words"]
