"""Re-ranking of retrieval: shared images, similarities that are added, and eight pairs found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug_jax import data, tasks
from mplug_jax.data import pipeline
from mplug_jax.evaluators import retrieval as evaluators
from mplug_jax.models.factory import build_model
from mplug_jax.tasks import base, matching
from tests.support import random_state, retrieval_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return retrieval_files.write(tmp_path_factory.mktemp("retrieval"))


def task_and_inputs(folder, **changes):
  """-> (task, random parameters, images and captions of a batch)."""
  c = retrieval_files.steady_config(folder, task__rerank_similarity="none", **changes)
  tokenizer = retrieval_files.tokenizer(folder)
  task = tasks.get("retrieval")(build_model(c, tokenizer), c, tokenizer)
  batch = retrieval_files.first_batch(c, tokenizer)
  batch = {name: batch[name] for name in ("image", "caption")}
  return task, random_state.params(jax.eval_shape(task.init, jax.random.key(0), batch), 0.1), batch


INDEX = np.random.default_rng(0).integers(0, 8, (8, 5))  # texts for each image


def shared_and_separate(task, params, batch):
  """-> (scores of pairs with an image's keys and values computed once, of separate pairs, inputs).

  The inputs are those of matching.match_scores.
  """
  images, texts = np.repeat(np.arange(8), 5), INDEX.reshape(-1)

  def alone(module, image, ids):
    mask = ids != task.tokenizer.pad_id
    return module.match_logits(
      module.fuse(module.encode_text(ids, mask), mask, base.encode_image(module, image))[1]
    )[:, 1]

  memory, embedded = task._image_memory(params, batch), task._embed_texts(params, batch)
  stride = task.model.stride
  assert len(memory["keys_values"]) == stride
  assert (memory["tokens"] is None) == (stride == 2)
  shared = task._rerank(params, {"memory": memory, "texts": embedded, "pair_text": INDEX})
  separate = task.apply(params, alone, batch["image"][images], batch["caption"][texts])
  return shared["score"], separate, (memory, embedded)


def check_shared(shared, expected):
  np.testing.assert_allclose(shared.reshape(-1), expected, atol=1e-5)
  assert np.std(expected) > 1e-3


@pytest.fixture(scope="module")
def unconnected(folder):
  """Scores without connected layers, from one program.

  ((shared, separate), {similarity: scores of three parameters}, products of the features,
  temperature). The second parameters have both matching logits shifted, the third have them
  swapped.
  """
  task, params, batch = task_and_inputs(folder, model__stride=2, model__fusion_layers=2)
  temperature = params["temp"]["value"]
  heads = [
    jax.tree.map(change, params["itm_head"])
    for change in (lambda x: x, lambda x: x + (x.ndim == 1), lambda x: x[..., ::-1])
  ]

  def scores(params, heads, batch):
    *both, (memory, texts) = shared_and_separate(task, params, batch)

    def of_head(head):
      return {
        name: task.apply(
          params | {"itm_head": head},
          matching.match_scores,
          memory,
          texts,
          INDEX,
          temperature,
          name,
        )
        for name in ("none", "add", "likelihood")
      }

    images, captions = task._embed_image(params, batch)["feature"], texts["feature"][INDEX]
    return both, jax.lax.map(of_head, heads), images, captions

  both, by_name, images, captions = jax.device_get(
    jax.jit(scores)(params, jax.tree.map(lambda *x: np.stack(x), *heads), batch)
  )
  return both, by_name, np.einsum("ge,gpe->gp", images, captions), temperature


def test_shared_image_gives_the_scores_of_separate_pairs(unconnected, folder):
  """Layers before the first connected one compute an image's keys and values once."""
  check_shared(*unconnected[0])
  task, params, batch = task_and_inputs(folder, model__stride=1, model__fusion_layers=2)
  connected = jax.jit(lambda *args: shared_and_separate(task, *args)[:2])
  check_shared(*jax.device_get(connected(params, batch)))


def test_similarity_adds_to_the_match_score(unconnected):
  """Two logits shifted alike are the same match; swapped ones give the logit of no match."""
  _, by_name, similarity, temperature = unconnected
  (logit, _, no_match), (added, _, _) = by_name["none"], by_name["add"]
  likelihood, again, _ = by_name["likelihood"]
  np.testing.assert_allclose(added, logit + similarity, atol=1e-5)
  np.testing.assert_allclose(again, likelihood, atol=1e-4)
  odds = logit - no_match
  np.testing.assert_allclose(likelihood, odds + similarity / temperature, atol=1e-4)
  assert np.abs(odds - logit).max() > 1e-3
  assert np.std(odds) > 1e-4


@pytest.mark.slow  # tests/tasks/test_pretrain.py overfits both terms besides two others
def test_overfits_and_retrieves_eight_pairs(folder, tmp_path):
  """The matching loss reaches 0, the contrastive loss the entropy of its targets.

  That entropy is not 0, because the queue holds each image several times. Then every caption finds
  its image and every image its caption, before and after re-ranking.
  """
  c = retrieval_files.steady_config(
    folder,
    model__initializer_range=0.05,
    task__alpha=0.0,
    task__rerank_k=4,
    task__negatives__group=8,
    ema__decay=0.9,
    optim__schedule__name="constant",
    optim__lr=3e-3,
    optim__weight_decay=0.0,
    optim__name="adamw",
    optim__b2=0.999,
    eval__limit=0,
  )
  tokenizer = retrieval_files.tokenizer(folder)
  transform, source = data.make_transform(c, tokenizer, train=True), data.get_source(c, "train")
  (batch,) = pipeline.eval_batches(source, transform, batch_size=8, threads=0)
  built = retrieval_files.built(c, tokenizer, jax.devices()[:1])
  evaluator = evaluators.RetrievalEvaluator(c, tokenizer, str(tmp_path))
  state, healthy, steps, result = (
    random_state.state(built, c.model.initializer_range),
    jnp.bool_(True),
    0,
    {},
  )
  while steps < 1000 and result.get("r_mean") != 100:
    for _ in range(25):
      columns = np.concatenate([batch["id"], np.asarray(state.extra["idx_queue"])[0]])
      state, metrics, health = built.train_step(state, batch, healthy)
    steps += 25
    floor = np.log((batch["id"][:, None] == columns).sum(1)).mean()
    itc, itm = (float(metrics[name][0] / metrics[name][1]) for name in ("loss_itc", "loss_itm"))
    if itc - floor < 0.05 and itm < 0.01:  # of the negatives drawn; all others take a little longer
      result = evaluator.run(
        {name: functools.partial(fn, state.params) for name, fn in built.predict.items()}
      )
  assert itc - floor < 0.05, (itc, floor)
  assert itm < 0.01
  assert bool(health["ok"])
  assert (
    result["r_mean"] == result["similarity_r_mean"] == result["txt_r1"] == result["img_r1"] == 100
  )
