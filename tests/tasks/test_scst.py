"""Self-critical training: rewards, loss, candidates, meshes, microbatches, learning."""

import functools
import types

import jax
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data.sources import chunked
from mplug_jax.metrics import captioning
from mplug_jax.models.factory import build_model
from mplug_jax.tasks import scst, scst_rewards
from mplug_jax.training import loop
from mplug_jax.training.build import Host
from tests.support import caption_run, mesh_case, random_state, tiny_run

COUNT = 3


def config(**changes):
  return caption_run.config(
    "tiny",
    "caption_scst",
    **{
      "data__records": 16,
      "task__count": COUNT,
      "task__max_length": 8,
      "task__beams": 1,
      "optim__schedule__warmup_steps": 0,
      **changes,
    },
  )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return caption_run.tokenizer(tmp_path_factory.mktemp("tokenizer"), config())


class Case(mesh_case.MeshCase):
  """The tiny task, wide initialisation, a batch with a corrupt row prepared by real candidates.

  Gradients on any mesh.
  """

  def __init__(self, tokenizer):
    self.config, self.tokenizer = (
      config(model__initializer_range=0.1, task__normalize="official", **mesh_case.FIT),
      tokenizer,
    )
    self.data = caption_run.batch(self.config, tokenizer)
    self.data["corrupt"][5] = True
    self.built = loop.build(self.config, tokenizer, 10, 10, jax.devices()[:1])
    self.state = random_state.host_state(self.built, self.config.model.initializer_range)
    self.batch = self.built.task.prepare(self.state, self.data, Host(self.built.predict))
    # Untrained captions match nothing: rewards that differ, so that there is a gradient.
    self.batch["reward"] = (
      np.random.default_rng(0).uniform(0, 2, self.batch["reward"].shape).astype(np.float32)
    )
    self.batch["candidate_length"][2, 1] = 0  # an empty place in a beam


@pytest.fixture(scope="module")
def case(tokenizer):
  return Case(tokenizer)


@pytest.fixture(scope="module")
def reference(case):
  return case.gradients()


# ---- the loss


def test_prepared_batch_matches_batch_spec(case):
  spec = case.built.task.batch_spec(8)
  assert {name: (x.shape, x.dtype) for name, x in case.batch.items()} == {
    name: (x.shape, x.dtype) for name, x in spec.items()
  }


def test_loss_is_minus_normalized_score_times_advantage(case, reference):
  b = case.batch
  logits = case.forward(case.state.params).astype(np.float64).reshape(8, COUNT, 9, -1)
  total, count = 0.0, 0
  for row in range(8):
    for k in range(COUNT):
      length = b["candidate_length"][row, k]
      score = 0.0
      for t in range(1, length):
        scores = logits[row, k, t - 1]
        score += scores[b["candidates"][row, k, t]] - np.log(np.exp(scores).sum())
      penalty = ((5 + length - 1) / 6) ** 0.6
      if length:
        total -= score / penalty / length * (b["reward"][row, k] - b["baseline"][row])
        count += 1
  _, loss, metrics = reference
  assert count == 8 * COUNT - COUNT - 1
  assert loss == pytest.approx(total / count, rel=1e-4)
  assert metrics["reward"][0] / metrics["reward"][1] == pytest.approx(
    b["reward"][b["candidate_length"] > 0].mean(), rel=1e-5
  )
  lengths = b["candidate_length"][b["candidate_length"] > 0]
  assert metrics["length"] == ((lengths - 1).sum(), count)
  assert metrics["corrupt_images"][0] == 1


def test_score_without_normalization_is_the_log_probability():
  logits = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
  ids, lengths = np.random.default_rng(1).integers(0, 7, (2, 5)), np.array([4, 2])
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = [
    log_probs[0, 1, ids[0, 2]] + log_probs[0, 2, ids[0, 3]],
    0.0,
  ]  # behind two prompt tokens
  scores = scst.log_probabilities(logits, ids, lengths, 2)
  np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
  advantage = np.array([2.0, 1.0])
  np.testing.assert_allclose(
    scst.policy_losses(scores, lengths, advantage, "none"), -scores * advantage
  )
  np.testing.assert_allclose(
    scst.policy_losses(scores, lengths, advantage, "official"), -scores / lengths * advantage
  )


@pytest.mark.parametrize(
  ("shape", "parts"), [pytest.param((8, 1, 1), 1, marks=pytest.mark.slow), ((2, 2, 2), 2)]
)
def test_loss_and_gradients_equal_those_of_one_device(case, reference, shape, parts):
  """On meshes, one of them in two microbatches."""
  gradients, loss, _ = case.gradients(shape, parts)
  assert loss == pytest.approx(float(reference[1]), rel=1e-4, abs=1e-6)  # a sum of both signs
  tiny_run.assert_gradients_equal(tiny_run.flat(gradients), tiny_run.flat(reference[0]))


@pytest.mark.slow
def test_two_microbatches_equal_one(case, reference):
  gradients, loss, _ = case.gradients(parts=2)
  assert loss == pytest.approx(float(reference[1]), rel=1e-4, abs=1e-6)
  tiny_run.assert_gradients_equal(tiny_run.flat(gradients), tiny_run.flat(reference[0]))


def test_corrupt_rows_and_empty_candidates_have_no_gradient(case, reference):
  changed = {name: x.copy() for name, x in case.batch.items()}
  (
    changed["image"][5],
    changed["reward"][5],
    changed["reward"][2, 1],
    changed["candidates"][2, 1],
  ) = 255, 9.0, 9.0, 1
  gradients, loss, _ = case.gradients(batch=changed)
  assert loss == reference[1]
  for name, x in tiny_run.flat(gradients).items():
    np.testing.assert_array_equal(x, tiny_run.flat(reference[0])[name], err_msg=name)


def test_batch_without_candidates_has_no_gradient(case):
  batch = case.batch | {"candidate_length": np.zeros_like(case.batch["candidate_length"])}
  gradients, loss, _ = case.gradients(batch=batch)
  assert loss == 0
  assert all((x == 0).all() for x in jax.tree.leaves(gradients))


# ---- candidates and rewards


def _prepare(tokenizer, said, batch=None, greedy=None, lengths=None, **changes):
  """`prepare` on candidates [[text, ...] of each row] that are given instead of generated."""
  c = config(task__max_length=30, **changes)
  task = scst.ScstTask(build_model(c, tokenizer), c, tokenizer)

  def rows(texts):
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    out = np.full((len(ids), 31), tokenizer.pad_id, np.int32)
    for row, own in zip(out, ids):
      row[: len(own)] = own
    return out, np.array([len(own) for own in ids])

  def sample(params, given):
    found = [rows(texts) for texts in said]
    out = {
      "candidates": np.stack([x for x, _ in found]),
      "length": np.stack([n for _, n in found]) if lengths is None else lengths,
    }
    if greedy:
      out["greedy"], out["greedy_length"] = rows(greedy)
    return out

  if batch is None:
    batch = caption_run.batch(c, tokenizer)
  batch = {name: x[: len(said)] for name, x in batch.items()}
  return task, task.prepare(
    types.SimpleNamespace(params=None, step=np.int32(4)), batch, Host({"sample": sample})
  )


def test_reward_compares_with_the_captions_of_the_image(tokenizer):
  """Equals CIDEr-D with document frequencies of all training captions, in any batch."""
  source = data.get_source(config(), "train")
  batch = caption_run.batch(config(), tokenizer)
  own, other = (source.captions(int(i))[0] for i in batch["index"][:2])
  _, out = _prepare(tokenizer, [[own, other, ""], [other, own, "a red circle"]], batch)
  references = [captioning.tokenize(source.source.captions(i)) for i in range(len(source.source))]
  metric = captioning.CiderD(references)
  for row, texts in enumerate([[own, other, ""], [other, own, "a red circle"]]):
    expected = metric.score(captioning.tokenize(texts), [references[batch["index"][row]]] * 3)
    np.testing.assert_allclose(out["reward"][row], expected, rtol=1e-5, atol=1e-6)
  assert out["reward"][0, 0] > out["reward"][0, 1]
  assert out["reward"][1, 0] > out["reward"][1, 1]
  assert out["reward"][0, 2] == 0
  np.testing.assert_allclose(out["baseline"], out["reward"].mean(1), rtol=1e-6)
  assert (out["draw"] == 4).all()


def test_the_greedy_caption_can_be_the_baseline(tokenizer):
  source, batch = data.get_source(config(), "train"), caption_run.batch(config(), tokenizer)
  first, second = source.captions(int(batch["index"][0]))[:2]
  _, out = _prepare(
    tokenizer, [["a", first, second]], batch, greedy=[first], task__baseline="greedy"
  )
  assert out["baseline"][0] == out["reward"][0, 1] > 0
  assert out["reward"].shape == (1, 3)


def test_empty_candidates_and_corrupt_images_have_length_zero(tokenizer):
  batch = caption_run.batch(config(), tokenizer)
  batch["corrupt"][1] = True
  source = data.get_source(config(), "train")
  own = source.captions(int(batch["index"][0]))[0]
  _, out = _prepare(
    tokenizer, [[own, "a", "a"], ["a", "a", "a"]], batch, lengths=np.array([[5, 4, 1], [3, 3, 3]])
  )  # 1: the prompt alone
  assert out["candidate_length"].tolist() == [[5, 4, 0], [0, 0, 0]]
  assert out["baseline"][0] == pytest.approx(out["reward"][0, :2].mean())
  assert out["baseline"][1] == 0


@pytest.fixture(scope="module")
def generate(case):
  """Function (steps, **changes of the config) -> candidates of the case's model at these steps."""

  @functools.cache
  def sample(changes):
    c = config(**dict(changes))
    task = scst.ScstTask(build_model(c, case.tokenizer), c, case.tokenizer)
    return jax.jit(task.predict_fns()["sample"])

  def generate(steps=(0,), **changes):
    batch = {k: case.data[k] for k in ("image", "mask", "corrupt", "index")}
    return [
      jax.device_get(
        sample(tuple(changes.items()))(
          case.state.params, batch | {"draw": np.full(8, step, np.int32)}
        )
      )
      for step in steps
    ]

  return generate


def test_draws_depend_on_seed_and_step(case, generate):
  first, again, later = generate((2, 2, 3), task__baseline="greedy", seed=1)
  np.testing.assert_array_equal(first["candidates"], again["candidates"])
  assert (first["candidates"] != later["candidates"]).any()
  assert (first["candidates"][:, 0] != first["candidates"][:, 1]).any()
  assert (first["candidates"][0] != first["candidates"][1]).any()
  np.testing.assert_array_equal(first["greedy"], later["greedy"])
  assert first["candidates"].shape == (8, COUNT, 9)
  assert (first["candidates"][:, :, 0] == case.tokenizer.bos_id).all()
  other = case.built.task.prepare(  # its seed is 0
    case.state.replace(step=np.int32(2)), case.data, Host(case.built.predict)
  )
  assert (first["candidates"] != other["candidates"]).any()


@pytest.mark.parametrize("mode", ["standard", "reference"])
def test_beams_differ_and_do_not_depend_on_the_step(generate, mode):
  first, later = generate((2, 3), task__candidates="beam", task__beam_mode=mode)
  np.testing.assert_array_equal(first["candidates"], later["candidates"])
  assert (first["candidates"][:, 0] != first["candidates"][:, 1]).any(-1).all()


def test_generation_with_dropout_depends_on_the_step(generate):
  beam = dict(task__candidates="beam", task__beam_mode="standard")
  dropout = beam | {"task__sample_dropout": True}
  first, again, later = generate((2, 2, 3), model__dropout_rate=0.3, **dropout)
  np.testing.assert_array_equal(first["candidates"], again["candidates"])
  assert (first["candidates"] != later["candidates"]).any()
  (uncached,), (cached,) = generate(**dropout), generate(**beam)
  np.testing.assert_array_equal(uncached["candidates"], cached["candidates"])
  np.testing.assert_array_equal(uncached["length"], cached["length"])


# ---- learning, and what is refused


def test_rewarded_captions_become_more_probable(case):
  """The log-probability of the one rewarded candidate rises above that of the others."""
  batch = case.batch | {
    "reward": np.tile(np.float32([0, 1, 0]), (8, 1)),
    "baseline": np.full(8, 1 / 3, np.float32),
  }

  log_probabilities = jax.jit(scst.log_probabilities, static_argnums=3)

  def scores(params):
    logits = case.forward(params).reshape(8, COUNT, 9, -1)
    return np.asarray(log_probabilities(logits, batch["candidates"], batch["candidate_length"], 1))

  params, loss = case.train(batch, 10)
  change, counted = scores(params) - scores(case.state.params), batch["candidate_length"] > 0
  assert np.isfinite(loss)
  assert change[:, 1][counted[:, 1]].mean() > 0.1 > change[:, [0, 2]][counted[:, [0, 2]]].mean()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"task__candidates": "beams"}, "config.task.candidates='beams' is not one of beam, sample"),
    ({"task__baseline": "best"}, "config.task.baseline='best' is not one of mean, greedy"),
    ({"task__normalize": "length"}, "config.task.normalize='length' is not one of official, none"),
    ({"task__count": 1}, "config.task.count=1: the mean of a single candidate is its own reward"),
    ({"task__count": 0, "task__baseline": "greedy"}, "config.task.count=0 must be at least 1"),
  ],
)
def test_invalid_config_values_raise(tokenizer, changes, message):
  with pytest.raises(ValueError, match=message):
    loop.build(config(**changes), tokenizer)


def test_missing_captioning_run_raises():
  with pytest.raises(
    ValueError, match="continues from a captioning run: name its folder, as init=runs/caption"
  ):
    caption_run.config("small", "caption_scst")


class Captions:
  """Source of images with given captions."""

  def __init__(self, captions):
    self._captions = captions

  def __len__(self):
    return len(self._captions)

  def __getitem__(self, index):
    return {"image_id": f"image {index}"}

  def captions(self, index):
    return self._captions[index]

  def counts(self):
    return np.array([len(texts) for texts in self._captions])


def rewards_of(captions):
  images = Captions(captions)
  return scst_rewards.Rewards(chunked.Chunked(images, 1, "captions", images.counts()))


def test_images_without_a_caption_have_no_reward(caplog):
  rewards = rewards_of([["a dog", ""], ["", "..."], ["a cat"]])
  same = rewards_of([["a dog"], ["a cat"]])
  # Records 0 and 1 are the captions of image 0, records 2 and 3 those of image 1.
  first, second, third = rewards([["a dog", "a cat"], ["a dog"], ["a cat"]], [1, 2, 4])
  np.testing.assert_allclose(first, same([["a dog", "a cat"]], [0])[0])
  np.testing.assert_allclose(third, same([["a cat"]], [1])[0])
  assert np.isnan(second).all()
  assert "3 of 5 reference captions have no word" in caplog.text
  assert "'image 0', 'image 1'" in caplog.text


@pytest.mark.parametrize("captions", [[["", " "]], [["a dog"]], [["a dog"], ["a dog"]]])
def test_rewards_that_are_always_zero_are_refused(captions):
  with pytest.raises(ValueError, match="CIDEr says nothing here: .* 0 for every caption"):
    rewards_of(captions)


def test_candidates_of_images_without_a_caption_do_not_count(tokenizer, monkeypatch):
  monkeypatch.setattr(
    scst.ScstTask, "_rewards", lambda self, texts, indices: [np.array([1, 2]), np.full(2, np.nan)]
  )
  _, out = _prepare(tokenizer, [["a star", "red"], ["a star", "red"]], lengths=np.full((2, 2), 4))
  assert out["candidate_length"].tolist() == [[4, 4], [0, 0]]
  np.testing.assert_array_equal(out["reward"], [[1, 2], [0, 0]])
  np.testing.assert_array_equal(out["baseline"], [1.5, 0])
