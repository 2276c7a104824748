"""The mapping of PyTorch state dicts to parameters: complete, exact, and every mistake is named."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from mplug_jax.conversion import mapping
from mplug_jax.parallel import rules
from mplug_jax.tasks import vqa
from tests.support import parity


class PadZero:
  pad_id = 0


@pytest.fixture(scope="module")
def base_style():
  return parity.Recording(parity.FOLDERS[0] / "vqa_G1.npz")


@pytest.fixture(scope="module")
def large_style():
  return parity.Recording(parity.FOLDERS[0] / "vqa_G5.npz")


@pytest.fixture(scope="module", params=["base_style", "large_style"])
def recording(request):
  return request.getfixturevalue(request.param)


def shapes(tree):
  return {
    rules.path_name(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)
  }


def task_params(model):
  """Abstract parameters of the VQA task."""
  config = ml_collections.ConfigDict(
    {
      "prng_impl": "hash",
      "task": {
        "predict": "generate",
        "rank_answers": (),
        "distill": {"alpha": 0.0, "axis": "vocabulary"},
      },
      "data": {
        "frames": 0,
        "questions_per_image": 1,
        "max_question": 4,
        "max_answers": 1,
        "max_answer_tokens": 4,
      },
    }
  )
  task = vqa.VqaTask(model, config, PadZero)
  batch = task.batch_spec(1)
  return jax.eval_shape(
    lambda: task.init(jax.random.key(0), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch))
  )


def test_the_result_is_the_parameter_tree_of_the_task(recording):
  expected = shapes(task_params(recording.model))
  for momentum in (False, True):
    params = mapping.params_from_torch(recording.state_dict, recording.geometry, momentum)
    assert shapes(params) == expected
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_no_number_of_a_used_tensor_is_lost(recording):
  """Sums of squares of the used tensors equal those of the parameters."""
  params = mapping.params_from_torch(recording.state_dict, recording.geometry)
  g = recording.geometry
  unused = (
    "_m.",
    "visual.proj",
    "fusion_encoder.embeddings",
    "predictions.decoder",
    "position_ids",
  )
  connected = [j for j in range(g["fusion_layers"]) if j and j % g["stride"] == 0]
  stored = 1 + max(
    int(k.split(".")[3])
    for k in recording.state_dict
    if k.startswith("fusion_encoder.encoder.layer.")
  )
  first = stored - g["fusion_layers"]
  dead = [f"fusion_encoder.encoder.layer.{n}." for n in range(first)]
  dead += [f"fusion_encoder.encoder.layer.{first + j}.crossattention" for j in connected]
  used = [
    x
    for k, x in recording.state_dict.items()
    if not any(u in k for u in unused)
    and not k.startswith(tuple(dead))
    and (not k.startswith("visual_encoder.") or k.startswith("visual_encoder.visual."))
  ]
  total = sum(np.square(x.astype(np.float64)).sum() for x in used)
  converted = sum(np.square(x.astype(np.float64)).sum() for x in jax.tree.leaves(params))
  assert sum(x.size for x in used) == sum(x.size for x in jax.tree.leaves(params))
  assert abs(converted - total) < 1e-9 * total


def test_layouts(recording):
  """One tensor of each kind, by hand."""
  sd = recording.state_dict
  g = recording.geometry
  params = mapping.params_from_torch(sd, g)
  block = f"visual_encoder.visual.transformer.resblocks.{g['vision_layers'] - 1}."
  width = g["vision_width"]
  attention = params["visual_encoder"]["blocks"]["attention"]
  for n, name in enumerate(("query", "key", "value")):
    np.testing.assert_array_equal(
      attention[name]["kernel"][-1],
      sd[block + "attn.in_proj_weight"][n * width : (n + 1) * width].T,
    )
    np.testing.assert_array_equal(
      attention[name]["bias"][-1], sd[block + "attn.in_proj_bias"][n * width : (n + 1) * width]
    )
  image = np.random.default_rng(0).normal(
    size=(3, g["patch_size"], g["patch_size"])
  )  # channels first
  expected = (sd["visual_encoder.visual.conv1.weight"] * image).sum((1, 2, 3))
  np.testing.assert_allclose(
    image.transpose(1, 2, 0).reshape(-1) @ params["visual_encoder"]["patch_embed"]["kernel"],
    expected,
    rtol=1e-5,
  )
  layer = "text_decoder.bert.encoder.layer.0."
  converted = jax.tree.map(lambda x: x[0], params["text_decoder"]["layers"])
  np.testing.assert_array_equal(
    converted["crossattention"]["value"]["kernel"], sd[layer + "crossattention.self.value.weight"].T
  )
  np.testing.assert_array_equal(
    converted["output_norm"]["scale"], sd[layer + "output.LayerNorm.weight"]
  )
  np.testing.assert_array_equal(
    params["text_decoder"]["head"]["bias"], sd["text_decoder.cls.predictions.bias"]
  )


def test_momentum_copies_are_a_set_of_their_own(recording):
  online, momentum = (
    mapping.params_from_torch(recording.state_dict, recording.geometry, m) for m in (False, True)
  )
  kernel = "text_encoder.encoder.layer.0.intermediate.dense.weight"
  for params, key in (
    (online, kernel),
    (momentum, kernel.replace("text_encoder", "text_encoder_m")),
  ):
    np.testing.assert_array_equal(
      params["text_encoder"]["layers"]["intermediate"]["kernel"][0], recording.state_dict[key].T
    )
  names = mapping.online_names(
    ["temp", "text_encoder_m.a", "text_encoder.a", "temp_m", "visual_encoder.b_m.c"]
  )
  assert names == {
    "temp": "temp",
    "text_encoder.a": "text_encoder.a",
    "visual_encoder.b_m.c": "visual_encoder.b_m.c",
  }
  names = mapping.online_names(["temp", "text_encoder_m.a", "temp_m"], momentum=True)
  assert names == {"text_encoder.a": "text_encoder_m.a", "temp": "temp_m"}


def drop(state_dict, prefix):
  assert any(k.startswith(prefix) for k in state_dict)
  return {k: x for k, x in state_dict.items() if not k.startswith(prefix)}


def test_mistakes_are_named(base_style):
  sd = base_style.state_dict
  g = base_style.geometry

  def refused(state_dict, message, geometry=g):
    with pytest.raises(ValueError, match=message):
      mapping.params_from_torch(state_dict, geometry)

  refused(
    sd | {f"text_encoder.cls.{name}": np.zeros(3) for name in "ab"},
    "2 unknown tensors: text_encoder.cls.a, text_encoder.cls.b",
  )
  refused(sd | {"module.visn_fc.weight": np.zeros(3)}, "1 unknown tensors: module.visn_fc.weight")
  query = "encoder.layer.{}.attention.self.query.weight"
  refused(
    sd | {"text_encoder." + query.format("00"): sd["text_encoder." + query.format(0)]},
    r"1 leaves written twice: text_encoder/layers/attention",
  )
  last = g["text_layers"] - 1
  refused(
    drop(sd, f"text_encoder.encoder.layer.{last}."),
    "16 leaves missing: text_encoder/layers/attention",
  )
  refused(
    drop(sd, "text_decoder.bert.encoder.layer.0.output.dense.bias"),
    "1 leaves missing: text_decoder/layers/output",
  )
  refused(
    drop(sd, "visual_encoder.visual.transformer.resblocks.0."),
    "leaves missing: visual_encoder/blocks",
  )
  refused(sd, "leaves missing: text_decoder/layers", g | {"decoder_layers": 9})
  refused(
    sd, "leaves missing: fusion_encoder/layer_", g | {"fusion_layers": g["fusion_layers"] + 1}
  )
  refused(
    sd,
    "tensors of another shape: visual_encoder.visual.conv1",
    g | {"patch_size": 2 * g["patch_size"]},
  )


def test_every_parameter_of_every_head_has_a_row(base_style):
  """Keys of the pre-training and retrieval models that recordings of VQA lack."""
  g = base_style.geometry
  width = g["hidden_size"]
  embed = g["embed_dim"]
  vocab = g["vocab_size"]
  head = "fusion_encoder.cls.predictions."
  arrays = {
    "vision_proj.weight": (embed, width),
    "vision_proj.bias": (embed,),
    "text_proj.weight": (embed, width),
    "text_proj.bias": (embed,),
    "itm_head.weight": (2, width),
    "itm_head.bias": (2,),
    "temp": (),
    "image_queue": (embed, 3),
    "queue_ptr": (1,),
    head + "bias": (vocab,),
    head + "transform.dense.weight": (width, width),
    head + "transform.dense.bias": (width,),
    head + "transform.LayerNorm.weight": (width,),
    head + "transform.LayerNorm.bias": (width,),
    head + "decoder.weight": (vocab, width),
    head + "decoder.bias": (vocab,),
  }
  params = mapping.params_from_torch(
    base_style.state_dict | {k: np.ones(s, np.float32) for k, s in arrays.items()}, g
  )
  result = shapes(params)
  assert result == mapping.leaf_shapes(g)
  assert result["vision_proj/kernel"] == (width, embed)
  assert result["fusion_encoder/mlm_head/word/embedding"] == (vocab, width)
