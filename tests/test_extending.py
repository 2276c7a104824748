"""What an extension costs: new definitions and one row in each table that lists them."""

import json

import numpy as np

from mplug_jax import data, evaluators, tasks
from mplug_jax.conversion import exporter, formats, importer
from mplug_jax.conversion.formats.format import Format, Placement
from mplug_jax.tensor_files import open as tensor_open
from mplug_jax.tensor_files import write
from mplug_jax.training import evaluate, loop
from tests.support import brightness, tiny_run

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


def test_one_row_each_trains_and_evaluates_a_new_task(tmp_path, monkeypatch):
  module = brightness.__name__
  monkeypatch.setitem(data.EXAMPLES, "brightness", module)
  monkeypatch.setitem(tasks.TASKS, "brightness", f"{module}:BrightnessTask")
  monkeypatch.setitem(evaluators.EVALUATORS, "brightness", f"{module}:BrightnessEvaluator")
  vocabulary = tmp_path / "vocab.txt"
  special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
  vocabulary.write_text("\n".join([*special, *brightness.WORDS]))
  config = tiny_run.config(total_steps=2, batch_size=8, eval__batch_size=8, eval__limit=0)
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
