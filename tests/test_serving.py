"""Exports for serving give what the live model gives, from files and texts, for any number of rows."""

import json
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tiny_run

from mplug_jax import data, tasks
from mplug_jax.build import build_model
from mplug_jax.data import tokenizer as tokenizers
from mplug_jax.serving import export, inputs

pytest.importorskip("flatbuffers")

WORDS = "what is the blue shape ? there a circle not red in image yes no on of left two dog <person> , . -"


def made(folder, name, **changes):
  """The tiny task of configs/<name>.py with a small tokenizer and random parameters, wide enough for answers to differ."""
  c = runpy.run_path(str(tiny_run.ROOT / "configs" / f"{name}.py"))["get_config"]("tiny").unlock()
  c.update_from_flattened_dict({"model.initializer_range": 0.2, "eval.batch_size": export.LARGEST_BATCH} | {
      key.replace("__", "."): value for key, value in changes.items()})
  if c.tokenizer.kind == "wordpiece":
    tokenizer = tokenizers.WordPieceTokenizer("\n".join([*tokenizers.SPECIAL_TOKENS, *WORDS.split(), "##s", "##h"]).encode())
  else:
    tokenizer = tokenizers.train_sentencepiece(WORDS.split(), 400, folder, tokenizers.location_names(c.tokenizer.locations))
  task = tasks.get(c.task.name)(build_model(c, tokenizer), c, tokenizer)
  batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), task.batch_spec(2))
  return task, jax.jit(task.init)(jax.random.key(0), batch)


def photograph(path, width, height):
  """A picture of no square shape, saved without loss."""
  pixels = np.random.default_rng(width).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
  Image.fromarray(pixels).resize((width, height), Image.BICUBIC).save(path)
  return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  return [photograph(folder / f"{n}.png", *size) for n, size in enumerate(((90, 60), (64, 64), (40, 120)))]


def served(folder):
  """-> (serving.json, its tokenizer, function (name, images, texts) -> arrays)."""
  about = json.loads((folder / "serving.json").read_text())
  tokenizer, weights = inputs.Tokenizer(folder, about["tokenizer"]), inputs.read_weights(folder / "weights.safetensors")

  def run(name, images=(), texts=()):
    call = jax.jit(jax.export.deserialize(bytearray((folder / f"{name}.jax").read_bytes())).call)
    return jax.tree.map(np.asarray, call(weights, inputs.make_batch(about, name, tokenizer, images, texts)))
  return about, tokenizer, run


def live(task, params, name, batch):
  return jax.tree.map(np.asarray, jax.jit(task.predict_fns()[name])(params, batch))


def assert_same(found, expected):
  """Equal integers, floats to rounding; `found` may have left names out."""
  for name, values in found.items():
    assert values.dtype == expected[name].dtype and values.shape == expected[name].shape
    np.testing.assert_allclose(values, expected[name], rtol=1e-5 if values.dtype.kind == "f" else 0, atol=1e-6, err_msg=name)


def examples(task, records):
  """Records -> a batch as evaluation makes it."""
  transform = data.make_transform(task.config, task.tokenizer, train=False)
  rows = [transform(n, record, None) | {"mask": np.True_} for n, record in enumerate(records)]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_answers_of_the_export_are_those_of_the_live_model(tmp_path, images):
  task, params = made(tmp_path / "tokenizer", "vqa", data__questions_per_image=2)
  about = export.export(task, params, tmp_path / "served", ["generate"])
  assert about["platforms"] == ["cpu", "cuda", "tpu"] and about["functions"]["generate"]["inputs"]["question"]["shape"] == ["b", "q", 16]
  _, tokenizer, run = served(tmp_path / "served")
  texts = [["what is the blue shape?", "is there a circle?"], ["Is there NOT a red shape in the image?", ""], ["yes", "what " * 40]]
  expected = live(task, params, "generate", examples(task, [
      {"image": str(path), "image_id": n, "questions": [
          {"question_id": 0, "question": q, "ocr": "", "objects": "", "answers": [], "weights": None} for q in questions]}
      for n, (path, questions) in enumerate(zip(images, texts))]))
  found = run("generate", images, texts)
  assert_same(found, expected)
  assert_same(run("generate", images[1:2], texts[1][:1]), {name: x[1:2, :1] for name, x in expected.items()})
  tokens, length = found["tokens"], found["length"]
  assert [tokenizer.decode(t) for t in tokens[0]] == [task.tokenizer.decode(t[:n]) for t, n in zip(tokens[0], length[0])]
  assert len({tuple(t) for row in tokens for t in row}) > 1, "all answers alike prove little"
  with pytest.raises(FileExistsError, match="exists"):
    export.export(task, params, tmp_path / "served")
  tiny_run.refused(lambda: export.export(task, params, tmp_path / "other", ["fly"]), "'fly'", "generate")
  assert not list(tmp_path.glob("other*"))


TEXTS = ["A red shape, on the left (of two)!", "no dogs", "the <person> is - not / there? " * 12]


@pytest.mark.slow
def test_wordpieces_and_ranked_answers(tmp_path, images):
  task, params = made(tmp_path / "tokenizer", "vqa", tokenizer__kind="wordpiece", task__rank_answers=("yes", "no", "red dogs"),
                      task__predict="rank", task__beams=3, data__questions_per_image=1)
  export.export(task, params, tmp_path / "served")
  about, tokenizer, run = served(tmp_path / "served")
  assert about["answers"] == ["yes", "no", "red dogs"]
  batch = examples(task, [{"image": str(path), "image_id": n, "questions": [
      {"question_id": 0, "question": text, "ocr": "", "objects": "", "answers": [], "weights": None}]}
      for n, (path, text) in enumerate(zip(images, TEXTS))])
  for name in ("rank", "generate"):
    assert_same(run(name, images, TEXTS), live(task, params, name, batch))
  ids = task.tokenizer.encode("is there no red dogs? isn't it two's")
  assert tokenizer.decode(ids) == task.tokenizer.decode(ids)


@pytest.mark.slow
def test_search_and_matching(tmp_path, images):
  task, params = made(tmp_path / "tokenizer", "pretrain")
  export.export(task, params, tmp_path / "served")
  _, _, run = served(tmp_path / "served")
  batch = {"image": examples(task, [{"image": str(p), "image_id": n} for n, p in enumerate(images)])["image"],
           "caption": np.stack([data.retrieval.caption_rows(task.config, task.tokenizer)(text) for text in TEXTS])}
  assert_same(run("embed_image", images), live(task, params, "embed_image", batch))
  texts = live(task, params, "embed_texts", batch)
  assert_same(run("embed_texts", (), TEXTS), texts)
  memory = live(task, params, "image_memory", batch)
  pairs = {"memory": memory, "texts": texts, "pair_text": np.arange(3, dtype=np.int32)[:, None]}
  assert_same(run("match", images, TEXTS), {"score": live(task, params, "rerank", pairs)["score"][:, 0]})


@pytest.mark.slow
def test_boxes(tmp_path, images):
  task, params = made(tmp_path / "tokenizer", "grounding", data__expressions_per_image=1)
  export.export(task, params, tmp_path / "served")
  _, _, run = served(tmp_path / "served")
  batch = examples(task, [{"image": str(p), "image_id": n, "expressions": [{"text": text, "box": None}]}
                          for n, (p, text) in enumerate(zip(images, TEXTS))])
  assert_same(run("locate", images, TEXTS), live(task, params, "locate", batch))


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("snli_ve", 1), ("nlvr2", 2)])
def test_statements_about_one_or_two_images(tmp_path, images, name, count):
  task, params = made(tmp_path / "tokenizer", name)
  export.export(task, params, tmp_path / "served")
  about, _, run = served(tmp_path / "served")
  assert about["labels"] == list(task.config.data.labels)
  groups = [[images[(n + i) % 3] for i in range(count)] for n in range(3)]
  batch = examples(task, [{"images": list(map(str, group)), "id": n, "sentence": text, "label": ""}
                          for n, (group, text) in enumerate(zip(groups, TEXTS))])
  assert_same(run("classify", groups if count > 1 else [g[0] for g in groups], TEXTS), live(task, params, "classify", batch))


@pytest.mark.slow
def test_the_example_runs_without_this_package(tmp_path, images):
  task, params = made(tmp_path / "tokenizer", "caption")
  export.export(task, params, tmp_path / "served")
  blocked = "import sys; sys.modules['mplug_jax'] = None; sys.argv = ['serve.py', 'generate', sys.argv[1]]; import runpy; "
  out = subprocess.run([sys.executable, "-c", blocked + f"sys.path.insert(0, {str(tmp_path / 'served')!r}); "
                        f"runpy.run_path({str(tmp_path / 'served' / 'serve.py')!r}, run_name='__main__')", str(images[0])],
                       capture_output=True, text=True, cwd=tmp_path)
  assert out.returncode == 0, out.stderr
  expected = live(task, params, "generate", examples(task, [{"image": str(images[0]), "image_id": 0, "captions": []}]))
  assert out.stdout.splitlines()[-1] == task.tokenizer.decode(expected["tokens"][0, :expected["length"][0]]).removeprefix(
      task.prompt.said).strip()
