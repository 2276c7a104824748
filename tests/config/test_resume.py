"""config.json of earlier runs: renamed keys and values, added keys, resume conflicts."""

import json

import pytest

from mplug_jax import config as config_lib
from mplug_jax.config import resume
from tests.support import tiny_run


@pytest.fixture
def renamed(monkeypatch):
  """Tables as if keys and a value of today had other names in earlier versions."""
  keys = {"optim.rate": "optim.lr", "data.joint": "data.fields", "network": "model", "old.a": "b.c"}
  monkeypatch.setattr(resume, "RENAMED_KEYS", keys)
  monkeypatch.setattr(resume, "RENAMED_VALUES", {"data.order": {"mixed": "shuffled", 0: "none"}})


@pytest.mark.usefixtures("renamed")
def test_upgrade_renames_keys_sections_and_values():
  old = {
    "optim": {"rate": 0.1, "b1": 0.9},
    "network": {"heads": 2},
    "data": {"order": "mixed", "joint": "q=question"},
    "old": {"a": 3},
  }
  before = json.dumps(old)
  new = config_lib.upgrade(old)
  assert new["optim"] == {"lr": 0.1, "b1": 0.9}
  assert new["model"] == {"heads": 2, "loss_chunk": 0}
  assert new["data"]["order"] == "shuffled"
  assert new["data"]["fields"] == "q=question"
  assert new["b"] == {"c": 3}
  assert json.dumps(old) == before
  assert config_lib.upgrade(new) == new


@pytest.mark.usefixtures("renamed")
def test_upgrade_keeps_other_values_and_todays_key():
  old = {"optim": {"rate": 0.1, "lr": 0.2}, "data": {"order": ["mixed"]}}
  assert config_lib.rename(old) == {"optim": {"lr": 0.2}, "data": {"order": ["mixed"]}}
  assert config_lib.rename({"optim": 1, "data": {"order": "sorted"}}) == {
    "optim": 1,
    "data": {"order": "sorted"},
  }


@pytest.mark.usefixtures("renamed")
def test_renamed_keys_are_no_resume_conflict():
  new = {"optim": {"lr": 0.1}, "model": {"heads": 2}, "data": {"order": "shuffled"}}
  old = {"optim": {"rate": 0.1}, "network": {"heads": 2}, "data": {"order": "mixed"}}
  assert config_lib.resume_conflicts(old, new) == ([], [])
  old["network"]["heads"] = 4
  assert config_lib.resume_conflicts(old, new) == (["model.heads: 4 -> 2"], [])


def test_added_keys_get_the_value_of_the_earlier_run():
  upgraded = config_lib.upgrade({"data": {"name": "scenes"}, "model": {}})
  assert upgraded["data"]["empty_prefix"] == 0.0
  assert "augment" not in upgraded["data"]
  assert upgraded["model"] == {"loss_chunk": 0}  # attention_impl and ops may change
  assert "task" not in upgraded


def test_scst_config_of_an_earlier_run_reads_as_todays():
  today = config_lib.load("caption_scst:tiny")
  old = json.loads(config_lib.to_json(today))
  old["task"]["normalise"] = old["task"].pop("normalize")
  assert config_lib.from_json(json.dumps(old)).task.normalize == "none"
  assert config_lib.resume_conflicts(old, json.loads(config_lib.to_json(today))) == ([], [])


def test_model_keys_of_an_earlier_run_read_as_todays():
  today = json.loads(config_lib.to_json(tiny_run.config()))
  today["model"]["attention_impl"] = "reference"
  old = json.loads(json.dumps(today))
  for name in ("dropout", "attention_dropout", "vision_attention_dropout"):
    old["model"][name] = old["model"].pop(f"{name}_rate")
  del old["model"]["attention_impl"]
  old["model"]["attention"] = "plain"
  assert config_lib.rename(old)["model"] == today["model"]
  assert config_lib.resume_conflicts(old, today) == ([], [])


@pytest.mark.parametrize(
  ("name", "key", "value", "old_key", "old_value"),
  [
    ("grounding:base", "task.eval_normalization", "clip", "task.eval_normalisation", "clip"),
    ("grounding:base", "task.box_weights", "per_example", "task.box_weights", "own"),
    ("caption", "task.prompt_mode", "standard", "task.prompt_mode", "mended"),
    ("video_qa", "data.frame_sampling", "uniform", "data.frame_sampling", "centres"),
    ("snli_ve", "data.easy_fraction", 0.5, "data.easier", 0.5),
    ("vqa:black_images", "data.black_images", True, "data.blank_image", True),
  ],
)
def test_names_of_earlier_runs_read_as_todays(name, key, value, old_key, old_value):
  today = json.loads(config_lib.to_json(config_lib.load(name)))
  assert resume.flat(today)[key] == value
  old = json.loads(json.dumps(today))
  del old[key.split(".")[0]][key.split(".")[1]]
  old[old_key.split(".")[0]][old_key.split(".")[1]] = old_value
  assert config_lib.resume_conflicts(old, today) == ([], [])
  assert (
    resume.flat(json.loads(config_lib.to_json(config_lib.from_json(json.dumps(old)))))[key] == value
  )


def test_todays_config_keeps_its_values():
  today = json.loads(config_lib.to_json(tiny_run.config()))
  assert config_lib.rename(today) == today
  assert resume.flat(today).items() <= resume.flat(config_lib.upgrade(today)).items()


def test_renamed_keys_do_not_chain():
  """Every row leads to today's name, so that the order of the rows does not matter."""
  assert not resume.RENAMED_KEYS.keys() & set(resume.RENAMED_KEYS.values())


def test_run_older_than_a_key_resumes():
  new = json.loads(config_lib.to_json(tiny_run.config()))
  old = json.loads(config_lib.to_json(tiny_run.config()))
  del old["data"]["fields"], old["data"]["allow_overlap"]
  assert config_lib.resume_conflicts(old, new) == ([], [])
  new["data"]["fields"] = "question=q"
  assert config_lib.resume_conflicts(old, new) == (['data.fields: "" -> "question=q"'], [])


def test_attention_change_is_reported_not_refused():
  new = config_lib.default_config("vqa", "tiny").to_dict()
  old = {**new, "model": {k: v for k, v in new["model"].items() if k != "attention_impl"}}
  assert config_lib.resume_conflicts(old, new) == (
    [],
    ['model.attention_impl: "reference" -> "auto"'],
  )


def test_other_random_keys_are_reported_not_refused():
  new = config_lib.default_config("vqa", "tiny").to_dict()
  old = {key: value for key, value in new.items() if key != "prng_impl"}
  assert config_lib.resume_conflicts(old, new) == ([], ['prng_impl: "jax" -> "hash"'])
  assert config_lib.resume_conflicts(old, new | {"prng_impl": "jax"}) == ([], [])


def test_resume_conflicts():
  old = {
    "seed": 0,
    "batch_size": 32,
    "task": {"name": "vqa"},
    "model": {"vision": {"width": 768}, "rates": [0.1, 0.1]},
    "optim": {"lr": 1e-3, "schedule": {"name": "cosine"}},
    "log_every": 10,
  }
  assert config_lib.resume_conflicts(old, old) == ([], [])
  new = {
    "seed": 1,
    "batch_size": 32,
    "task": {"name": "vqa", "ocr": True},
    "model": {"vision": {"width": 1024}, "rates": (0.1, 0.1)},
    "optim": {"lr": 1e-2, "schedule": {}},
    "log_every": 20,
  }
  assert config_lib.resume_conflicts(old, new) == (
    ["model.vision.width: 768 -> 1024", "seed: 0 -> 1", "task.ocr: (absent) -> true"],
    [
      "log_every: 10 -> 20",
      "optim.lr: 0.001 -> 0.01",
      "optim.schedule: (absent) -> {}",
      'optim.schedule.name: "cosine" -> (absent)',
    ],
  )


def test_a_run_of_the_benchmark_before_the_script_was_a_key_reports_the_change():
  old = {"eval": {"split": "val"}}
  new = {"eval": {"split": "val", "vqa_script": "2021"}}
  assert config_lib.resume_conflicts(old, new) == ([], ['eval.vqa_script: "2017" -> "2021"'])
  new["eval"]["vqa_script"] = "2017"
  assert config_lib.resume_conflicts(old, new) == ([], [])
  assert config_lib.resume_conflicts(old, {"eval": {"split": "val"}}) == ([], [])
