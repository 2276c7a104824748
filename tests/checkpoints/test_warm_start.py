"""Starting a run from other weights: loading, resizing, and declaration of the rest."""

import jax
import numpy as np
import pytest

from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.checkpoints import warm_start
from mplug_jax.checkpoints.position_embeddings import resize_positions
from mplug_jax.data.text import sentencepiece
from mplug_jax.training import loop, workdir
from tests.support import tiny_run


def made(folder, seed=0, **changes):
  """(config, TrainState) of the tiny VQA run with `changes`.

  Parameters are random numbers; averages are 1 above them.
  """
  c = tiny_run.config(tokenizer__vocab_size=64, **changes)
  abstract = loop.build(c, tiny_run.tokenizer(folder, c)).abstract
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: jax.device_put(rng.standard_normal(x.shape, np.float32), x.sharding), abstract.params
  )
  averages = (
    jax.tree.map(
      lambda x, y: jax.device_put(np.asarray(x) + 1, y.sharding), params, abstract.ema_params
    )
    if c.ema.decay
    else ()
  )
  return c, abstract.replace(params=params, ema_params=averages)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Folder and parameters of a run with averages."""
  folder = tmp_path_factory.mktemp("run")
  _, state = made(folder, seed=1, ema__decay=0.9)
  manager = checkpoint.Manager(folder)
  manager.save(3, {"params": state.params, "ema_params": state.ema_params}, {"step": 3})
  manager.close()
  return folder, tiny_run.flat(state.params)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
  return made(tmp_path_factory.mktemp("fresh"), ema__decay=0.9)


def options(c, *paths, new=(), unused=()):
  c = c.copy_and_resolve_references().unlock()
  c.init.update({"paths": tuple(map(str, paths)), "new": new, "unused": unused})
  return c.init


def part(path, tree, folder):
  """A checkpoint in `folder` with the leaves whose path starts with `path`."""
  manager = checkpoint.Manager(folder)
  manager.save(0, {"params": {name: x for name, x in tree.items() if name.startswith(path)}}, {})
  manager.close()
  return folder


def test_every_parameter_and_its_average(run, fresh):
  folder, params = run
  c, state = fresh
  assert not np.array_equal(
    tiny_run.flat(state.params)["text_encoder/layers/output/kernel"],
    params["text_encoder/layers/output/kernel"],
  )
  new, report = warm_start.init_from(state, options(c, folder))
  assert set(report.values()) == {str(folder)}
  assert report.keys() == params.keys()
  for name, x in tiny_run.flat(new.params).items():
    np.testing.assert_array_equal(x, params[name], err_msg=name)
  for name, x in tiny_run.flat(new.ema_params).items():
    np.testing.assert_array_equal(x, params[name] + 1, err_msg=name)
  assert jax.tree.map(lambda x: x.sharding, new.params) == jax.tree.map(
    lambda x: x.sharding, state.params
  )
  assert any(
    line == f"text_encoder: 21 parameters from {folder}" for line in warm_start.summary(report)
  ), warm_start.summary(report)


def test_another_resolution_resizes_the_positions(run, tmp_path):
  folder, params = run
  c, state = made(tmp_path, model__image_size=48)
  new, report = warm_start.init_from(state, options(c, folder))
  name = "visual_encoder/position_embedding"
  np.testing.assert_array_equal(tiny_run.flat(new.params)[name], resize_positions(params[name], 10))
  assert report[name] == f"{folder}, resized from 5 to 10 positions"


def test_several_checkpoints_fill_what_they_have_and_the_rest_is_declared(run, fresh, tmp_path):
  _, params = run
  c, state = fresh
  nested = {name: x for name, x in params.items()}
  a = part("visual_encoder", nested, tmp_path / "a")
  b = part("text", {name: x + 1 for name, x in nested.items()}, tmp_path / "b")
  with pytest.raises(
    ValueError,
    match=r"\d+ parameters are in none of the checkpoints \(fusion_encoder/.*config.init.new",
  ):
    warm_start.init_from(state, options(c, a, b))
  new, report = warm_start.init_from(
    state, options(c, a, b, new=("(fusion_encoder|visn_\\w+)/.*",))
  )
  before, after = tiny_run.flat(state.params), tiny_run.flat(new.params)
  for name, x in after.items():
    expected = (
      params[name]
      if name.startswith("visual")
      else params[name] + 1
      if name.startswith("text")
      else before[name]
    )
    np.testing.assert_array_equal(x, expected, err_msg=name)
  assert any("at random" in line for line in warm_start.summary(report))
  both, _ = warm_start.init_from(
    state, options(c, b, run[0])
  )  # the first that has a parameter counts
  name = "text_encoder/layers/output/kernel"
  np.testing.assert_array_equal(tiny_run.flat(both.params)[name], params[name] + 1)


def test_what_does_not_fit_is_named(run, fresh, tmp_path):
  folder, params = run
  c, state = fresh
  more = part("", params | {"itm_head/kernel": np.zeros((2, 2), np.float32)}, tmp_path / "more")
  message = r"1 parameters of the checkpoints have no place \(itm_head/kernel\); "
  with pytest.raises(ValueError, match=message + ".*config.init.unused"):
    warm_start.init_from(state, options(c, more))
  warm_start.init_from(state, options(c, more, unused=("itm_head/.*",)))
  wide = part("", params | {"text_decoder/head/bias": np.zeros(7, np.float32)}, tmp_path / "wide")
  with pytest.raises(
    ValueError, match=r"text_decoder/head/bias has shape \(7,\) in .*wide and \(64,\) in the model"
  ):
    warm_start.init_from(state, options(c, wide))
  with pytest.raises(FileNotFoundError, match="nowhere"):
    warm_start.init_from(state, options(c, tmp_path / "nowhere"))


# ---- the tokenizer


def test_a_run_reads_with_the_tokenizer_of_the_one_it_starts_from(tmp_path):
  """Token embeddings mean nothing to another tokenizer."""
  first = sentencepiece.train_sentencepiece(
    ["a red star is above a blue disc"] * 3, 60, tmp_path / "first" / "tokenizer"
  )
  other = sentencepiece.train_sentencepiece(
    ["quite another text, and longer"] * 3, 60, tmp_path / "other"
  )
  c = tiny_run.config(init__paths=(str(tmp_path / "converted"), str(tmp_path / "first")))
  tokenizer = workdir.prepare_tokenizer(c, str(tmp_path / "new"), None)
  assert tokenizer.fingerprint == first.fingerprint != other.fingerprint
  assert (
    workdir.prepare_tokenizer(c, str(tmp_path / "new"), None).fingerprint == first.fingerprint
  )  # on resumption
  c.tokenizer.path = str(tmp_path / "other" / "tokenizer.model")
  with pytest.raises(
    ValueError, match=r"The tokenizer \(.*\) is not the one recorded in config.init.paths, .*first"
  ):
    workdir.prepare_tokenizer(c, str(tmp_path / "refused"), None)
