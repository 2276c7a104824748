"""Zero-shot tasks about clips with a checkpoint that was trained on images."""

import importlib.util
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax.data.images import video
from mplug_jax.data.sources import scenes as scene_sources
from mplug_jax.models.factory import build_model
from mplug_jax.scenes import scene
from mplug_jax.tasks import base
from mplug_jax.training import evaluate
from tests.support import models_case, predictor_run, tiny_run

pytestmark = pytest.mark.usefixtures("one_device")


def config(name, arg):
  spec = importlib.util.spec_from_file_location(name, tiny_run.ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of pre-training with random parameters: it has those of every task."""
  c = predictor_run.config("pretrain", data__size=48, model__image_size=32)
  return predictor_run.save(tmp_path_factory.mktemp("run"), c)


def settings(c):
  c.unlock()
  c.model.image_size, c.data.size, c.compilation_cache, c.eval.limit, c.eval.batch_size = (
    32,
    48,
    "",
    6,
    8,
  )
  return c


def test_tokens_of_a_clip_equal_those_of_its_frames():
  c = tiny_run.config()
  c.unlock().model.vision_layers = 1
  model = build_model(c, type("Tokenizer", (), {"vocab_size": 20, "pad_id": 0}))
  clips = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32, 3)), jnp.uint8)

  def run(m):
    tokens = base.encode_image(m, clips)
    frames = [base.encode_image(m, clips[:, i]) for i in range(3)]
    return (
      tokens,
      frames,
      base.contrastive_features(m, tokens, None, 3)[0],
      [m.vision_proj(x[:, 0]) for x in frames],
    )

  params = models_case.random_params(model, run)
  tokens, frames, feature, projected = models_case.apply(model, run)(params)
  np.testing.assert_allclose(tokens, jnp.concatenate(frames, axis=1), rtol=1e-5, atol=1e-5)
  mean = np.mean(projected, axis=0)
  np.testing.assert_allclose(
    feature, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-4, atol=1e-5
  )
  assert base.image_shape(c, 32) == (32, 32, 3)


def test_questions_about_clips(run, tmp_path, capsys):
  """On all eight devices, which divide the clips."""
  c = settings(config("video_qa", "tiny"))
  c.mesh.data = 8
  result = evaluate.evaluate(c, tmp_path, run)
  out = capsys.readouterr().out
  assert 0 <= result["accuracy"] <= 100
  assert {"accuracy_direction", "accuracy_finally", "majority_answer"} <= result.keys()
  assert "final: accuracy" in out
  assert len(json.loads((tmp_path / "predictions.json").read_text())) == 6 * 5
  assert (tmp_path / "predictions.png").stat().st_size > 5000


def test_video_files_and_ranked_answers(run, tmp_path):
  (tmp_path / "videos").mkdir()
  clips, rows = scene_sources.SceneClips(scene.SceneConfig(48), "test"), []
  for i in range(3):
    record = clips[i]
    video.write_mp4(tmp_path / "videos" / f"{record['image_id']}.mp4", record["image"])
    rows += [
      {"video_id": record["image_id"], "question": q["question"], "answer": q["answers"][0]}
      for q in record["questions"]
    ]
  rows.append({"video_id": "lost", "question": "is it there?", "answer": "no"})
  (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "answers.json").write_text(
    json.dumps({answer: i for i, answer in enumerate(sorted({row["answer"] for row in rows}))})
  )
  c = settings(config("video_qa", f"tiny,data=video_qa,root={tmp_path},frames=4"))
  c.eval.limit, c.task.rank_top_k = 0, 4
  result = evaluate.evaluate(c, tmp_path / "out", run)
  answers = json.loads((tmp_path / "out" / "predictions.json").read_text())
  assert len(answers) == 16
  assert {row["answer"] for row in answers} <= {row["answer"] for row in rows}
  assert result["corrupt_images"] == 1
  assert 0 <= result["accuracy"] <= 100
  shutil.rmtree(tmp_path / "videos")
  with pytest.raises(
    FileNotFoundError,
    match="entry 1|line 1: image .*test-0.mp4 does not exist; check data.video_root",
  ):
    evaluate.evaluate(c, tmp_path / "out", run)


def shared(name, arg):
  """Settings with which clips that are rendered and clips of files share their programs."""
  c = settings(config(name, arg))
  if name == "video_caption":
    c.task.update(
      {"min_length": 1, "max_length": 6, "prompt": "", "beams": 10, "beam_mode": "reference"}
    )
  else:
    c.task.update({"rerank_k": 2, "rerank_similarity": "add"})
    c.data.max_caption = 35
  return c


def test_captions_of_clips(run, tmp_path, capsys):
  result = evaluate.evaluate(shared("video_caption", "tiny,frames=4"), tmp_path, run)
  assert result["CIDEr-D"] >= 0
  assert {"CIDEr-D_seen", "shuffled_CIDEr-D"} <= result.keys()
  assert "true" not in result
  assert "final: CIDEr-D" in capsys.readouterr().out
  assert len(json.loads((tmp_path / "predictions.json").read_text())) == 6


def test_searching_clips(run, tmp_path):
  c = shared("video_retrieval", "tiny,frames=4")
  c.eval.limit = 3  # of five captions each
  result = evaluate.evaluate(c, tmp_path / "clip", run)
  assert 0 <= result["r_mean"] <= 100
  assert result["pairs_scored"] > 0
  assert (tmp_path / "clip" / "predictions.png").stat().st_size > 5000


def test_searching_clips_by_one_frame(run, tmp_path):
  """Of a clip whose shape has one frame; re-ranking reads the tokens of any number of frames."""
  c = settings(config("video_retrieval", "tiny,sampling=2,frames=1"))
  c.eval.limit, c.task.rerank_k = 3, 0
  result = evaluate.evaluate(c, tmp_path, run)
  assert 0 <= result["r_mean"] <= 100
  assert {"txt_r1", "img_r1", "r_mean_unseen"} <= result.keys()


@pytest.mark.parametrize(
  ("name", "row", "file"),
  [
    (
      "video_caption:vatex",
      {"videoID": "test-{i}", "enCap": ["a red circle", "there it is"]},
      "test.json",
    ),
    ("video_retrieval:msrvtt", {"clip_name": "test-{i}", "caption": "clip {i}"}, "test.jsonl"),
  ],
)
def test_official_files(name, row, file, run, tmp_path):
  (tmp_path / "videos").mkdir()
  clips, rows = scene_sources.SceneClips(scene.SceneConfig(48), "test"), []
  for i in range(9):  # texts fill two batches, as those of three rendered clips
    video.write_mp4(tmp_path / "videos" / f"test-{i}.mp4", clips[i]["image"])
    rows.append(
      {key: value.format(i=i) if isinstance(value, str) else value for key, value in row.items()}
    )
  text = json.dumps(rows) if file.endswith(".json") else "".join(json.dumps(r) + "\n" for r in rows)
  (tmp_path / file).write_text(text)
  name, data = name.split(":")
  c = shared(name, f"tiny,data={data},root={tmp_path},frames=4")
  c.eval.limit = 0
  result = evaluate.evaluate(c, tmp_path / "out", run)
  assert np.isfinite(result[{"video_caption": "CIDEr-D", "video_retrieval": "r_mean"}[name]])
  assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) > 0
