"""Starting a run from other weights: loading, resizing, and declaration of the rest."""

import jax
import numpy as np
import pytest

from mplug_jax.checkpoints import manager as checkpoint
from mplug_jax.checkpoints import warm_start
from mplug_jax.checkpoints.position_embeddings import resize_positions
from mplug_jax.data.text import sentencepiece
from mplug_jax.training import workdir
from mplug_jax.training.build import build_for_evaluation
from tests.support import tiny_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """(config, abstract TrainState) of the tiny VQA run with averages."""
  c = tiny_run.config(tokenizer__vocab_size=64, ema__decay=0.9)
  tokenizer = tiny_run.tokenizer(tmp_path_factory.mktemp("tokenizer"), c)
  return c, build_for_evaluation(c, tokenizer).abstract


def drawn(abstract, seed):
  """Random parameters as numpy arrays, and averages 1 above them."""
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), abstract.params)
  return {"params": params, "ema_params": jax.tree.map(lambda x: x + 1, params)}


def placed(abstract, arrays):
  """A state of these arrays on the devices of `abstract`."""
  arrays = {
    name: jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), tree, abstract.params)
    for name, tree in arrays.items()
  }
  return abstract.replace(**arrays)


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
  """Folder and parameters of a run with averages."""
  folder = tmp_path_factory.mktemp("run")
  arrays = drawn(made[1], 1)
  manager = checkpoint.Manager(folder)
  manager.save(3, arrays, {"step": 3})
  manager.close()
  return folder, tiny_run.flat(arrays["params"])


@pytest.fixture(scope="module")
def fresh(made):
  c, abstract = made
  return c, placed(abstract, drawn(abstract, 0))


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


def test_another_resolution_resizes_the_positions(made, run):
  folder, params = run
  c, abstract = made
  table = abstract.params["visual_encoder"]["position_embedding"]
  larger = jax.ShapeDtypeStruct((10, 64), table.dtype, sharding=table.sharding)
  vision = abstract.params["visual_encoder"] | {"position_embedding": larger}
  abstract = abstract.replace(params=abstract.params | {"visual_encoder": vision})
  state = placed(abstract, drawn(abstract, 0)).replace(ema_params=())
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
  folder, _ = run
  c, state = fresh
  more = part("", {"itm_head/kernel": np.zeros((2, 2), np.float32)}, tmp_path / "more")
  message = r"1 parameters of the checkpoints have no place \(itm_head/kernel\); "
  with pytest.raises(ValueError, match=message + ".*config.init.unused"):
    warm_start.init_from(state, options(c, folder, more))
  warm_start.init_from(state, options(c, folder, more, unused=("itm_head/.*",)))
  wide = part("", {"text_decoder/head/bias": np.zeros(7, np.float32)}, tmp_path / "wide")
  with pytest.raises(
    ValueError, match=r"text_decoder/head/bias has shape \(7,\) in .*wide and \(64,\) in the model"
  ):
    warm_start.init_from(state, options(c, wide, folder))
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


LEAF = "text_decoder/layers/attention/query/kernel"


def spoiled(arrays, tree, count, value=np.nan):
  """Returns copies of the arrays with `count` values of one parameter replaced."""
  arrays = jax.tree.map(np.copy, arrays)
  node = arrays[tree]
  for key in LEAF.split("/"):
    node = node[key]
  node.reshape(-1)[:count] = value
  return arrays


@pytest.mark.parametrize("tree", ["params", "ema_params"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_run_does_not_start_from_values_that_are_not_finite(made, fresh, tmp_path, tree, value):
  manager = checkpoint.Manager(tmp_path)
  manager.save(1, spoiled(drawn(made[1], 1), tree, 3, value), {})
  manager.close()
  c, state = fresh
  message = rf"config.init.paths: 3 values of 1 tensor are not finite: {LEAF} \(3\), of {tmp_path}"
  with pytest.raises(ValueError, match=message):
    warm_start.init_from(state, options(c, tmp_path))


def test_values_that_are_not_finite_are_named_when_parameters_are_loaded(made, tmp_path, caplog):
  manager = checkpoint.Manager(tmp_path)
  manager.save(1, spoiled(drawn(made[1], 1), "params", 5), {})
  manager.close()
  abstract = made[1].params
  loaded = tiny_run.flat(warm_start.load_params(tmp_path, abstract))
  assert np.isnan(loaded[LEAF]).sum() == 5
  (message,) = [text for text in caplog.messages if "finite" in text]
  assert message.startswith(f"{tmp_path}: 5 values of 1 tensor are not finite: {LEAF} (5).")
  caplog.clear()
  warm_start.load_params(tmp_path, abstract, "ema_params")
  assert "finite" not in caplog.text
