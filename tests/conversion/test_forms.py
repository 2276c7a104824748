"""All forms of mPLUG checkpoints (wrappers, names, folders, shards, dtypes) convert to the same."""

import json

import ml_dtypes
import numpy as np
import pytest

from mplug_jax.conversion import importer, official_inventory
from mplug_jax.conversion.inspect.tensors import open_leaves
from mplug_jax.tensor_files import write as torch_write
from tests.support.official_state import GIVEN, STYLES, geometry, state_dict
from tests.support.torch_pickles import archive, build, call, name, new, tensor

TREES = ("params", "ema_params", "extra")
MLM_HEAD = "cls.predictions"


def pretrained():
  """Returns tensors of a pre-training checkpoint under the names of the fine-tuning code.

  They are float32: all parts, both heads, momentum and queues.
  """
  rng = np.random.default_rng(7)
  decoder = {
    key: x
    for key, x in state_dict("vqa", large=True).items()
    if key.startswith(("text_decoder.", "text_decoder_m."))
  }
  tensors = state_dict("retrieval", large=True) | {
    key: x if x.dtype == np.int64 else x.astype(np.float32) for key, x in decoder.items()
  }
  g = geometry(large=True)
  for suffix in ("", "_m"):
    head = f"fusion_encoder{suffix}.{MLM_HEAD}"
    shapes = {
      "bias": g["vocab_size"],
      "transform.dense.weight": (g["hidden_size"],) * 2,
      "transform.dense.bias": g["hidden_size"],
      "transform.LayerNorm.weight": g["hidden_size"],
      "transform.LayerNorm.bias": g["hidden_size"],
      "decoder.weight": (g["vocab_size"], g["hidden_size"]),
    }
    tensors |= {
      f"{head}.{key}": rng.standard_normal(shape).astype(np.float32)
      for key, shape in shapes.items()
    }
    tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"]
  return tensors


def converted(path, dest, **options):
  """Returns ({"params/...": array} of all trees, manifest).

  One file is written sooner than a folder.
  """
  manifest = importer.convert_checkpoint(path, dest, **GIVEN | options)
  with open_leaves(dest) as imported:
    return dict(imported.read(imported.leaves)), manifest


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """Returns tensors and the leaves converted from their official form, {"model": state dict}."""
  folder = tmp_path_factory.mktemp("reference")
  tensors = pretrained()
  torch_write.save_pth(folder / "official.pth", tensors)
  return tensors, converted(folder / "official.pth", folder / "ours.safetensors")[0]


def assert_same(leaves, expected):
  assert leaves.keys() == expected.keys()
  for leaf, x in expected.items():
    assert (leaves[leaf].dtype, leaves[leaf].shape) == (x.dtype, x.shape), leaf
    assert leaves[leaf].tobytes() == x.tobytes(), leaf


def renamed(tensors, style):
  def rename(key):
    for old, prefix in STYLES[style]:
      key = prefix + key[len(old) :] if key.startswith(old) else key
    return key

  return {rename(key): x for key, x in tensors.items()}


def test_a_pretraining_checkpoint_fills_every_part(reference):
  """Compares leaves of each kind: plain, transposed, stacked, split, heads, momentum, queues."""
  x, leaves = reference
  heads = {
    key: f"{key}.{MLM_HEAD}" for key in ("fusion_encoder", "fusion_encoder_m", "text_decoder")
  }
  in_proj = x["visual_encoder.visual.transformer.resblocks.1.attn.in_proj_weight"]
  pairs = {
    "params/fusion_encoder/mlm_head/word/embedding": x[f"{heads['fusion_encoder']}.decoder.weight"],
    "params/fusion_encoder/mlm_head/head/dense/kernel": x[
      f"{heads['fusion_encoder']}.transform.dense.weight"
    ].T,
    "ema_params/fusion_encoder/mlm_head/head/bias": x[f"{heads['fusion_encoder_m']}.bias"],
    "params/text_decoder/head/bias": x[f"{heads['text_decoder']}.bias"],
    "params/text_decoder/embeddings/word/embedding": x[
      "text_decoder.bert.embeddings.word_embeddings.weight"
    ],
    "params/vision_proj/kernel": x["vision_proj.weight"].T,
    "ema_params/text_proj/bias": x["text_proj_m.bias"],
    "params/itm_head/kernel": x["itm_head.weight"].T,
    "params/temp/value": x["temp"],
    "params/visn_fc/kernel": x["visn_fc.weight"].T,
    "params/fusion_encoder/layer_0/intermediate/kernel": x[
      "fusion_encoder.encoder.layer.2.intermediate.dense.weight"
    ].T,
    "extra/image_queue": x["image_queue"],
    "extra/idx_queue": x["idx_queue"],
    "extra/queue_ptr": x["queue_ptr"],
  }
  assert {leaf: leaves[leaf].tobytes() for leaf in pairs} == {
    leaf: array.tobytes() for leaf, array in pairs.items()
  }
  query = leaves["params/visual_encoder/blocks/attention/query/kernel"]
  np.testing.assert_array_equal(query[1], in_proj[: len(in_proj) // 3].T)
  stack = leaves["ema_params/text_encoder/layers/attention/out/kernel"]
  np.testing.assert_array_equal(
    stack,
    [x[f"text_encoder_m.encoder.layer.{i}.attention.output.dense.weight"].T for i in range(2)],
  )
  assert "ema_params/itm_head/kernel" not in leaves
  assert "ema_params/temp/value" not in leaves


@pytest.mark.parametrize("style", STYLES)
def test_naming_styles(style, reference, tmp_path):
  tensors, expected = reference
  torch_write.save_pth(tmp_path / "styled.pth", renamed(tensors, style))
  assert_same(converted(tmp_path / "styled.pth", tmp_path / "ours.safetensors")[0], expected)


def shards(folder, tensors, save, pattern, index):
  """Writes tensors in three files, and their index."""
  weight_map = {key: pattern.format(1 + i % 3) for i, key in enumerate(tensors)}
  for shard in set(weight_map.values()):
    save(folder / shard, {key: x for key, x in tensors.items() if weight_map[key] == shard})
  (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
  return folder


def single(file, save=torch_write.save_safetensors, complete=False, **options):
  """Returns a writer of one file, which returns its path, or with `complete` the folder."""

  def write(folder, tensors):
    save(folder / file, tensors, **options)
    return folder if complete else folder / file

  return write


PTH = torch_write.save_pth
MODELSCOPE_FOLDER = single("pytorch_model.bin", PTH, complete=True, wrapper="")
FORMS = {
  "wrapper module": single("w.pth", PTH, wrapper="module"),
  "wrapper state_dict": single("w.pth", PTH, wrapper="state_dict"),
  "no wrapper, no suffix": single("weights", PTH, wrapper=""),
  "ModelScope folder": lambda folder, x: MODELSCOPE_FOLDER(folder, renamed(x, "ModelScope")),
  "safetensors": single("w.safetensors"),
  "safetensors folder": single("model.safetensors", complete=True),
  "safetensors shards": lambda folder, x: shards(
    folder,
    x,
    torch_write.save_safetensors,
    "model-{}-of-3.safetensors",
    "model.safetensors.index.json",
  ),
  "bin shards": lambda folder, x: shards(
    folder, x, PTH, "pytorch_model-{}-of-3.bin", "pytorch_model.bin.index.json"
  ),
}


@pytest.mark.parametrize("form", FORMS)
def test_file_forms(form, reference, tmp_path):
  tensors, expected = reference
  (tmp_path / "source").mkdir()
  assert_same(
    converted(FORMS[form](tmp_path / "source", tensors), tmp_path / "ours.safetensors")[0], expected
  )


STORAGES = {"float32": "torch.FloatStorage", "int64": "torch.LongStorage"}


def in_instructions(tensors):
  """Returns ({name: instructions that rebuild the tensor}, {record: array}), for `archive`."""
  pairs = list(enumerate(tensors.items()))
  return (
    {
      key: tensor(str(i), x.shape, numel=x.size, kind=STORAGES[x.dtype.name])
      for i, (key, x) in pairs
    },
    {str(i): np.ascontiguousarray(x) for i, (_, x) in pairs},
  )


@pytest.mark.parametrize("latest", [True, False], ids=["latest", "tag folder"])
def test_a_deepspeed_folder_and_its_foreign_objects(latest, reference, tmp_path):
  tensors, expected = reference
  tag = tmp_path / "save" / "global_step1000"
  tag.mkdir(parents=True)
  ran = tmp_path / "ran"
  scaler = new("x.LossScaler", {"cur": 1})
  beside = {
    "optimizer": new(
      "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer", {"loss_scaler": scaler}
    ),
    "args": build(call("argparse.Namespace"), {"lr": 3e-5}),
    "lr_scheduler": call("os.system", f"touch {ran}"),
    "ds_version": "0.5.8",
    "dtype": name("torch.float16"),
    "global_steps": 1000,
  }
  module, records = in_instructions(renamed(tensors, "distributed"))
  archive(tag / "mp_rank_00_model_states.pt", {"module": module, **beside}, records)
  if latest:
    (tmp_path / "save" / "latest").write_text("global_step1000")
  leaves, manifest = converted(tmp_path / "save" if latest else tag, tmp_path / "ours.safetensors")
  assert_same(leaves, expected)
  assert {"os.system", "argparse.Namespace", "x.LossScaler"} <= manifest["placeholders"].keys()
  assert not ran.exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, reference, tmp_path):
  """The checkpoint has the file's precision, or float32 on request.

  The numbers are those of the file.
  """
  tensors, expected = reference

  def half(x):
    return x.astype(dtype) if x.dtype == np.float32 else x

  torch_write.save_safetensors(
    tmp_path / "half.safetensors", {key: half(x) for key, x in tensors.items()}
  )
  assert_same(
    converted(tmp_path / "half.safetensors", tmp_path / "ours.safetensors")[0],
    {leaf: half(x) for leaf, x in expected.items()},
  )
  wide, _ = converted(tmp_path / "half.safetensors", tmp_path / "wide.safetensors", dtype="float32")
  parameters = {leaf: x for leaf, x in expected.items() if not leaf.startswith("extra/")}
  assert_same(
    {leaf: wide[leaf] for leaf in parameters},
    {leaf: half(x).astype(np.float32) for leaf, x in parameters.items()},
  )


def test_layers_of_one_stack_in_different_precision(reference, tmp_path):
  """They become one leaf, which holds both without loss."""
  tensors, expected = reference
  rounded = "text_encoder.encoder.layer.0.intermediate.dense.weight"
  mixed = tensors | {rounded: tensors[rounded].astype(ml_dtypes.bfloat16)}
  torch_write.save_pth(tmp_path / "mixed.pth", mixed)
  leaves, _ = converted(tmp_path / "mixed.pth", tmp_path / "ours.safetensors")
  leaf = "params/text_encoder/layers/intermediate/kernel"
  stack = np.stack([mixed[rounded].astype(np.float32).T, expected[leaf][1]])
  assert not np.array_equal(stack, expected[leaf])
  assert_same(leaves, expected | {leaf: stack})


def test_without_momentum_copies_there_are_no_averages(reference, tmp_path):
  tensors, expected = reference
  online = {key: x for key, x in tensors.items() if not key.split(".")[0].endswith("_m")}
  assert 0 < len(online) < len(tensors)
  torch_write.save_pth(tmp_path / "online.pth", online)
  leaves, _ = converted(tmp_path / "online.pth", tmp_path / "ours.safetensors")
  assert_same(
    leaves, {leaf: x for leaf, x in expected.items() if not leaf.startswith("ema_params/")}
  )


PARTS = {
  "vqa": "fusion_encoder text_decoder text_encoder visn_fc visn_layer_norm visual_encoder",
  "caption": "fusion_encoder text_decoder text_encoder visn_fc visn_layer_norm visual_encoder",
  "retrieval": "fusion_encoder itm_head temp text_encoder text_proj vision_proj visn_fc "
  "visn_layer_norm visual_encoder",
  "grounding": "fusion_encoder text_decoder text_encoder text_proj vision_proj visn_fc "
  "visn_layer_norm visual_encoder",
  "videocap": "text_decoder visn_fc visn_layer_norm visual_encoder",
}


@pytest.mark.parametrize(
  ("task", "large"), [(task, i % 2 == 0) for i, task in enumerate(official_inventory.TASKS)]
)
def test_finetuned_checkpoints_of_every_task(task, large, tmp_path):
  """Every tensor is accounted for.

  The leaves are exactly those of the task's parts and hold as many numbers as the tensors.
  """
  tensors = state_dict(task, large)
  torch_write.save_pth(tmp_path / "official.pth", tensors)
  leaves, manifest = converted(tmp_path / "official.pth", tmp_path / "ours.safetensors")
  rows = manifest["tensors"]
  assert {row["name"] for row in rows} == tensors.keys()
  parts = {
    which: " ".join(sorted({leaf.split("/")[1] for leaf in leaves if leaf.startswith(f"{which}/")}))
    for which in TREES
  }
  online = " ".join(part for part in PARTS[task].split() if large or not part.startswith("visn_"))
  averaged = (
    " ".join(part for part in online.split() if part not in ("itm_head", "temp"))
    if task in ("vqa", "retrieval")
    else ""
  )
  assert parts == {
    "params": online,
    "ema_params": averaged,
    "extra": "idx_queue image_queue queue_ptr text_queue" if task == "retrieval" else "",
  }
  mapped = [row for row in rows if row["action"] == "map"]
  assert {leaf.partition("[")[0] for row in mapped for leaf in row["to"]} == {
    leaf for leaf in leaves if not leaf.startswith("extra/")
  }
  assert sum(int(np.prod(row["shape"])) for row in mapped) == sum(
    x.size for leaf, x in leaves.items() if not leaf.startswith("extra/")
  )
