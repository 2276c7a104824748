"""Schedules and groups against recordings of the official code, AdamW against float64 and optax."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mplug_jax import optim
from mplug_jax.optim import groups as groups_lib
from mplug_jax.optim import schedules
from mplug_jax.parallel import rules
from tests.support.paths import GOLDEN

CONFIG = {"lr": 3e-5, "visual_lr": 5e-6, "weight_decay": 0.02, "schedule": {"name": "constant"}}


def _tree(paths):
  tree = {}
  for path, leaf in paths.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def _flat(tree):
  return {rules.path_name(p): np.asarray(x, np.float64) for p, x in jax.tree.leaves_with_path(tree)}


def _params(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {
    "visual_encoder/blocks/mlp/up/kernel": (3, 8, 16),
    "visual_encoder/blocks/mlp/up/bias": (3, 16),
    "visual_encoder/ln_post/scale": (8,),
    "text_encoder/embeddings/word/embedding": (11, 8),
    "text_encoder/layers/output_norm/scale": (2, 8),
    "text_encoder/layers/output/kernel": (2, 16, 8),
    "temp/value": (),
  }
  return _tree({k: np.asarray(rng.normal(size=s), np.float32) for k, s in shapes.items()})


# ---- schedules


def _recorded(entry, key):
  """Learning rate of every update of a recorded run; key 1 or 2 picks the group."""
  rates = []
  for epoch in entry["epochs"]:
    per_step = np.empty(entry["steps"])
    for change in epoch["lr_changes"]:
      per_step[change[0] :] = change[key]
    rates.append(per_step)
  return np.concatenate(rates)


@pytest.mark.parametrize("steps_per_epoch", [50, 500])
@pytest.mark.parametrize(
  "name", ["vqa_mplug_base", "caption_mplug_base", "retrieval_coco_mplug_large"]
)
def test_official_schedule_equals_recording(name, steps_per_epoch):
  golden = json.loads((GOLDEN / f"schedule_{name}.json").read_text())
  entry = {**golden["steps_per_epoch"][str(steps_per_epoch)], "steps": steps_per_epoch}
  official = golden["config"]["schedular"]
  config = {
    "name": "official",
    "epochs": official["epochs"],
    "warmup_units": official["warmup_epochs"],
    "warmup_lr": official["warmup_lr"],
    "min_lr": official["min_lr"],
  }
  for key in (1, 2):
    expected = _recorded(entry, key)
    lr = golden["config"]["optimizer"][f"lr{key}"]
    schedule = jax.jit(schedules.make_schedule(config, lr, len(expected), steps_per_epoch))
    got = np.asarray(schedule(jnp.arange(len(expected))))
    np.testing.assert_array_max_ulp(got, expected.astype(np.float32), maxulp=1)
    assert float(schedule(len(expected) + 10**6)) == np.float32(official["min_lr"])


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_smooth_schedules_at_known_points(name):
  config = {"name": name, "warmup_epochs": 2, "end_lr": 1e-5}
  schedule = schedules.make_schedule(config, 1e-3, total_steps=300_000, steps_per_epoch=500)
  rates = np.asarray(schedule(np.array([0, 499, 999, 1000, 150_500, 300_000, 400_000])))
  np.testing.assert_allclose(
    rates, [1e-6, 5e-4, 1e-3, 1e-3, (1e-3 + 1e-5) / 2, 1e-5, 1e-5], rtol=1e-6
  )
  quarter = float(schedule(1000 + 299_000 // 4))
  share = {"cosine": (1 + np.cos(np.pi / 4)) / 2, "linear": 0.75}[name]
  np.testing.assert_allclose(quarter, 1e-5 + (1e-3 - 1e-5) * share, rtol=1e-5)


def test_constant_schedule_warms_up_then_stays():
  schedule = schedules.make_schedule({"name": "constant", "warmup_steps": 4}, 0.1, 100, 10)
  np.testing.assert_allclose(
    schedule(np.array([0, 1, 2, 3, 4, 99])), [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-6
  )


@pytest.mark.parametrize(
  ("config", "words"),
  [
    ({"name": "step"}, "known schedules: constant, cosine"),
    ({"name": "cosine", "warmup": 3}, "no field warmup"),
    ({"name": "cosine", "warmup_steps": 3, "warmup_epochs": 1}, "keep one"),
    ({"name": "cosine", "warmup_epochs": 11}, "110 steps; the run has 100"),
  ],
)
def test_bad_schedules_say_so(config, words):
  with pytest.raises(ValueError, match=words):
    schedules.make_schedule(config, 0.1, total_steps=100, steps_per_epoch=10)


# ---- groups

_BERT = [
  (r"embeddings\.word_embeddings\.weight", "embeddings/word/embedding"),
  (r"embeddings\.position_embeddings\.weight", "embeddings/position/embedding"),
  (r"embeddings\.token_type_embeddings\.weight", "embeddings/token_type/embedding"),
  (r"embeddings\.LayerNorm", "embeddings/norm"),
  (r"encoder\.layer\.N\.(\w*attention)\.self\.(\w+)", r"layers/\1/\2"),
  (r"encoder\.layer\.N\.(\w*attention)\.output\.dense", r"layers/\1/out"),
  (r"encoder\.layer\.N\.(\w*attention)\.output\.LayerNorm", r"layers/\1_norm"),
  (r"encoder\.layer\.N\.output\.LayerNorm", "layers/output_norm"),
  (r"encoder\.layer\.N\.(intermediate|output)\.dense", r"layers/\1"),
  (r"cls\.predictions\.transform\.(dense|LayerNorm)", r"head/\1"),
  (r"cls\.predictions\.bias", "head/bias"),
]
_CLIP = [
  (r"conv1", "patch_embed"),
  (r"positional_embedding", "position_embedding"),
  (r"transformer\.resblocks\.N\.attn\.out_proj", "blocks/attention/out"),
  (r"transformer\.resblocks\.N\.mlp\.c_fc", "blocks/mlp/up"),
  (r"transformer\.resblocks\.N\.mlp\.c_proj", "blocks/mlp/down"),
  (r"transformer\.resblocks\.N\.", "blocks/"),
]


def _flax_paths(torch_name):
  """Our paths of an official parameter, none for one the model does not use."""
  module, _, rest = torch_name.partition(".")
  if module == "visual_encoder":
    if not rest.startswith("visual.") or rest == "visual.proj":
      return []
    rest, table = rest.removeprefix("visual."), _CLIP
  elif module == "fusion_encoder" and rest.startswith("embeddings"):
    return []
  else:
    rest, table = rest.removeprefix("bert."), _BERT
  for pattern, replacement in table:
    rest = re.sub(pattern, replacement, rest)
  if packed := re.search(r"attn\.in_proj_(weight|bias)", rest):
    kind = {"weight": "kernel", "bias": "bias"}[packed[1]]
    return [f"{module}/blocks/attention/{name}/{kind}" for name in ("query", "key", "value")]
  norm = re.search(r"norm|LayerNorm|ln_", rest)
  rest = rest.replace(".weight", "/scale" if norm else "/kernel").replace(".", "/")
  if module == "fusion_encoder":
    rest = rest.replace("layers/", "layer_0/")
  return [f"{module}/{rest.replace('head/LayerNorm', 'head/norm')}"]


def test_official_groups_equal_recording():
  golden = json.loads((GOLDEN / "param_groups_vqa_base.json").read_text())
  expected = {}
  for group in golden["groups"]:
    for name in group["names"]:
      expected.update(dict.fromkeys(_flax_paths(name), (group["lr"], group["weight_decay"])))
  # Parameters that model lacks, by the rule of docs/official.md item 25.
  expected |= {
    "visn_fc/kernel": (3e-5, 0.02),
    "visn_fc/bias": (3e-5, 0.0),
    "visn_layer_norm/scale": (3e-5, 0.02),
    "visn_layer_norm/bias": (3e-5, 0.0),
    "temp/value": (3e-5, 0.02),
    "itm_head/kernel": (3e-5, 0.02),
    "itm_head/bias": (3e-5, 0.0),
  }
  assert len(expected) == 23 + 21 + 26 + 36 + 7  # vision, text, fusion, decoder, above
  groups = groups_lib.resolve_groups({**CONFIG, "groups": "official"}, list(expected))
  for (path, want), group in zip(expected.items(), groups, strict=True):
    assert (group.lr, group.weight_decay) == want, path
    assert group.name == ("visual" if path.startswith("visual_encoder/") else "main")


def test_plain_decays_kernels_alone():
  paths = list(_flat(_params()))
  groups = groups_lib.resolve_groups({**CONFIG, "groups": "plain"}, paths)
  assert {p for p, g in zip(paths, groups, strict=True) if g.weight_decay} == {
    "visual_encoder/blocks/mlp/up/kernel",
    "text_encoder/layers/output/kernel",
  }
  assert {(g.name, g.lr) for g in groups} == {("main", 3e-5)}


@pytest.mark.parametrize(
  ("groups", "words"),
  [
    ([["visual_encoder/.*", {}]], r"4 of 7 parameters match no.*temp/value"),
    ([[".*", {}], ["temp/.*", {}]], r"No parameter takes.*temp/"),
    ([["temp/.*", {"lr_mult": 2}], "plain"], "'main' has two learning rates"),
    ([["temp/.*", {"rate": 2}], "plain"], "no field rate"),
    ("bert", "known tables: official, plain"),
    ([[".*", {"freeze": True}]], "freezes every parameter"),
  ],
)
def test_bad_groups_say_so(groups, words):
  with pytest.raises(ValueError, match=words):
    optim.make({**CONFIG, "groups": groups}, _params(), 10, 5)


def test_official_without_visual_lr_and_unknown_optimizer_say_so():
  config = {"lr": 1e-3, "groups": "official", "schedule": {"name": "constant"}}
  with pytest.raises(ValueError, match="needs optim.visual_lr"):
    optim.make(config, _params(), 10, 5)
  with pytest.raises(ValueError, match="known optimizers: adafactor, adamw, muon"):
    optim.make({**CONFIG, "name": "lion"}, _params(), 10, 5)


# ---- optimizers


def _train(tx, params, steps, scale=1.0):
  """`steps` updates with gradients that depend on the step alone."""
  grads = [
    jax.tree.map(lambda g: g * np.float32(scale), {k: v for k, v in drawn.items() if k in params})
    for drawn in (_params(seed=100 + i) for i in range(steps))
  ]

  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(params, grads):
    return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

  return jax.device_get(run(params, jax.tree.map(lambda *x: np.stack(x), *grads)))


def test_adamw_equals_torch_formula_in_float64():
  config = {**CONFIG, "groups": "official", "clip": 0.7, "weight_decay": 0.3}
  config["schedule"] = {"name": "linear", "warmup_steps": 3}
  tx, schedules = optim.make(config, _params(), total_steps=10, steps_per_epoch=5)
  assert set(schedules) == {"main", "visual"}
  got, _ = _train(tx, _params(), steps=6)

  no_decay = ("bias", "output_norm/scale")
  params, got = _flat(_params()), _flat(got)
  m = {k: 0.0 for k in params}
  v = {k: 0.0 for k in params}
  for t in range(1, 7):
    grads = _flat(_params(seed=99 + t))
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for k, g in grads.items():
      g = g * min(1.0, 0.7 / (norm + 1e-6))
      lr = (5e-6 if k.startswith("visual") else 3e-5) * (t / 3 if t < 4 else 1 - (t - 4) / 7)
      params[k] = params[k] * (1 - lr * (0 if k.endswith(no_decay) else 0.3))
      m[k] = 0.9 * m[k] + 0.1 * g
      v[k] = 0.999 * v[k] + 0.001 * g**2
      denominator = np.sqrt(v[k]) / np.sqrt(1 - 0.999**t) + 1e-8
      params[k] = params[k] - lr / (1 - 0.9**t) * m[k] / denominator
  for k, value in params.items():
    np.testing.assert_allclose(got[k], value, rtol=1e-6, atol=1e-9, err_msg=k)
    assert not np.array_equal(got[k], _flat(_params())[k])


def test_adamw_equals_optax():
  config = {**CONFIG, "lr": 1e-2, "groups": [[".*", {}]]}
  ours, _ = _train(optim.make(config, _params(), 10, 5)[0], _params(), steps=5)
  theirs, _ = _train(optax.adamw(1e-2, weight_decay=0.02), _params(), steps=5)
  # optax computes 1 - b2^t in float32, which is 1.3e-5 off at t = 1.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), ours, theirs)


def test_small_gradients_are_not_clipped():
  config = {**CONFIG, "lr": 1e-2, "groups": "plain"}
  free, _ = _train(optim.make(config, _params(), 10, 5)[0], _params(), 3, scale=1e-3)
  clipped, _ = _train(optim.make({**config, "clip": 1.0}, _params(), 10, 5)[0], _params(), 3, 1e-3)
  jax.tree.map(np.testing.assert_array_equal, free, clipped)


def test_clipping_scales_as_torch_does():
  tx, _ = optim.make({**CONFIG, "groups": "plain", "clip": 1e-6}, _params(), 10, 5)
  grads = jax.tree.map(lambda g: g * np.float32(1e-6), _params(1))
  norm = np.sqrt(sum((g**2).sum() for g in _flat(grads).values()))
  update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[1])
  mu = _flat(update(grads, _params()).mu)
  for path, g in _flat(grads).items():
    np.testing.assert_allclose(mu[path], 0.1 * g * 1e-6 / (norm + 1e-6), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_frozen_parameters_stay_and_own_no_state(name):
  params = _params()
  frozen = [["visual_encoder/.*", {"freeze": True}], "official"]
  config = {**CONFIG, "name": name, "groups": frozen, "clip": 1.0}
  tx, schedules = optim.make(config, params, 10, 5)
  assert set(schedules) == {"main"}
  got, state = _train(tx, params, steps=2)
  jax.tree.map(np.testing.assert_array_equal, got["visual_encoder"], params["visual_encoder"])
  assert not np.array_equal(got["temp"]["value"], params["temp"]["value"])
  visual_shapes = {x.shape for x in jax.tree.leaves(params["visual_encoder"]) if x.ndim > 1}
  assert not visual_shapes & {x.shape for x in jax.tree.leaves(state)}
  # Their gradients do not count in the norm either: the others move as if they were alone.
  rest = {k: v for k, v in params.items() if k != "visual_encoder"}
  alone, _ = _train(optim.make({**config, "groups": "official"}, rest, 10, 5)[0], rest, steps=2)
  for k, v in alone.items():
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got[k], v)


def test_momentum_in_bfloat16():
  config = {**CONFIG, "lr": 1e-2, "groups": "plain"}
  exact, _ = _train(optim.make(config, _params(), 10, 5)[0], _params(), 4)
  half, state = _train(
    optim.make({**config, "mu_dtype": "bfloat16"}, _params(), 10, 5)[0], _params(), 4
  )
  assert {x.dtype for x in jax.tree.leaves(state.mu)} == {jnp.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype(jnp.float32)}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), exact, half)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_optimizers_fit_a_regression(name):
  rng = np.random.default_rng(0)
  x = np.asarray(rng.normal(size=(64, 128)), np.float32)
  y = x @ np.asarray(rng.normal(size=(128, 160)), np.float32)
  params = {
    "dense": {"kernel": np.zeros((128, 160), np.float32), "bias": np.zeros(160, np.float32)}
  }
  lr = 0.3 if name == "muon" else 0.05  # the root mean square of Muon's steps is a fifth of it
  config = {"name": name, "lr": lr, "schedule": {"name": "cosine"}, "mu_dtype": "bfloat16"}
  tx, _ = optim.make(config, params, 200, 100)

  def loss(p):
    return jnp.mean((x @ p["dense"]["kernel"] + p["dense"]["bias"] - y) ** 2)

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  if name == "adafactor":
    floats = [s for s in jax.tree.leaves(jax.eval_shape(tx.init, params)) if s.dtype == jnp.float32]
    assert max(s.size for s in floats) == 160  # factored: no second moment of the kernel's size
  losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=201)[1])(params)
  assert float(losses[-1]) < 0.01 * float(losses[0])
