"""Complete checkpoints are converted, exported and converted again, byte for byte.

The naming styles; refusals.
"""

import json
import weakref
from typing import NamedTuple

import jax
import ml_collections
import ml_dtypes
import numpy as np
import pytest

from mplug_jax.checkpoints import manager as manager_lib
from mplug_jax.checkpoints import reading, warm_start
from mplug_jax.conversion import exporter, importer, mapping, official_inventory, storage
from mplug_jax.conversion.geometry import infer_geometry
from mplug_jax.conversion.names import official_name, official_names
from mplug_jax.tensor_files import open, write
from tools import convert_checkpoint as convert_tool
from tools import export_torch as export_tool

TEXT_TOWER = official_inventory.ClipText(width=16, layers=1, embed=8, context=5, vocab=11)
GIVEN = dict(heads=2, fusion_layers=2, stride=1)


def geometry(large=False):
  return (
    dict(
      image_size=16,
      patch_size=8,
      vision_width=64,
      vision_layers=2,
      vocab_size=690,
      hidden_size=32 if large else 64,
      mlp_dim=48,
      max_positions=20,
      text_layers=2,
      decoder_layers=2,
      embed_dim=8,
      pad_id=0,
    )
    | GIVEN
  )


def state_dict(task, large=False, seed=0):
  """Random tensors of the official model of a small geometry: float32, some float16 and bfloat16.

  Tied names equal.
  """
  rng = np.random.default_rng(seed)
  tensors = {}
  inventory = official_inventory.inventory(
    task, geometry(large), TEXT_TOWER, stored_fusion_layers=4, queue=6
  )
  for i, (name, tensor) in enumerate(inventory.items()):
    if tensor.dtype == "int64":
      tensors[name] = (
        rng.integers(-100, 100, tensor.shape)
        if "queue" in name
        else official_inventory.constant(name, tensor)
      )
    else:
      dtype = (np.float32, np.float16, ml_dtypes.bfloat16)[i % 3 if task == "vqa" else 0]
      tensors[name] = np.asarray(rng.standard_normal(tensor.shape), np.float32).astype(dtype)
  for suffix in ("", "_m"):
    head, bert = (f"text_decoder{suffix}.{part}" for part in ("cls.predictions", "bert"))
    if f"{head}.bias" in tensors:
      tensors[f"{head}.decoder.bias"] = tensors[f"{head}.bias"]
      tensors[f"{head}.decoder.weight"] = tensors[f"{bert}.embeddings.word_embeddings.weight"]
  if "bbox_prob_mask" in tensors:
    tensors["bbox_prob_mask"] = official_inventory.constant(
      "bbox_prob_mask", inventory["bbox_prob_mask"]
    )
  return tensors


def save(path, tensors, **options):
  write.save_pth(path, tensors, **options)
  return path


def read(path):
  with open.open_tensors(path) as file:
    return {name: file[name] for name in file}


def assert_same_bytes(converted, expected):
  assert converted.keys() == expected.keys()
  for name, x in expected.items():
    assert (converted[name].dtype, converted[name].shape) == (x.dtype, x.shape), name
    assert converted[name].tobytes() == x.tobytes(), name


def dead(name, task="vqa"):
  keys = [name]
  momentum = bool(mapping.online_names(keys, momentum=True))
  inventory = official_inventory.inventory(
    task, geometry(), TEXT_TOWER, stored_fusion_layers=4, queue=6
  )
  converter = mapping.Converter(mapping.online_names(inventory, momentum), geometry())
  return converter.entry(next(iter(mapping.online_names(keys, momentum)))).action == "dead"


@pytest.mark.parametrize("converted", ["ours", "ours.safetensors"])
@pytest.mark.parametrize(
  ("task", "large"),
  [
    ("vqa", False),
    ("vqa", True),
    ("caption", False),
    ("retrieval", True),
    ("grounding", False),
    ("videocap", True),
  ],
)
def test_there_and_back_with_every_byte(task, large, converted, tmp_path):
  tensors = state_dict(task, large)
  source = save(tmp_path / "official.pth", tensors)
  importer.convert_checkpoint(source, tmp_path / converted, keep_dead=True, **GIVEN)
  manifest = exporter.export_torch(tmp_path / converted, tmp_path / "back.pth")
  assert_same_bytes(read(tmp_path / "back.pth"), tensors)
  assert not any("initialisation" in row["why"] for row in manifest["tensors"])


def test_what_never_runs_is_made_again_or_left_out(tmp_path):
  tensors = state_dict("vqa")
  importer.convert_checkpoint(save(tmp_path / "official.pth", tensors), tmp_path / "ours", **GIVEN)
  exporter.export_torch(tmp_path / "ours", tmp_path / "full.pth")
  exporter.export_torch(tmp_path / "ours", tmp_path / "slim.safetensors", slim=True)
  full = read(tmp_path / "full.pth")
  slim = read(tmp_path / "slim.safetensors")
  live = {name: x for name, x in tensors.items() if not dead(name)}
  assert_same_bytes(slim, live)
  assert {name: (x.shape, x.dtype) for name, x in full.items()} == {
    name: (x.shape, x.dtype) for name, x in tensors.items()
  }
  assert_same_bytes({name: full[name] for name in live}, live)
  assert not np.array_equal(
    full["visual_encoder.token_embedding.weight"], tensors["visual_encoder.token_embedding.weight"]
  )


def test_ours_to_torch_and_back(tmp_path):
  """All leaves of a converted checkpoint, momentum and queues, after another round."""
  importer.convert_checkpoint(
    save(tmp_path / "official.pth", state_dict("retrieval")),
    tmp_path / "a",
    dtype="float32",
    **GIVEN,
  )
  exporter.export_torch(tmp_path / "a", tmp_path / "back.pth")
  importer.convert_checkpoint(tmp_path / "back.pth", tmp_path / "b", **GIVEN)
  for which in ("params", "ema_params", "extra"):
    first, second = (reading.load_arrays(tmp_path / name, which) for name in "ab")
    assert first
    assert_same_bytes(second, first)


def test_the_result_is_read_as_parameters(tmp_path):
  g = geometry() | {"embed_dim": 256}  # no tensor of this task tells
  tensors = state_dict("caption")
  importer.convert_checkpoint(save(tmp_path / "official.pth", tensors), tmp_path / "ours", **GIVEN)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    mapping.params_from_torch(tensors, g),
  )
  importer.convert_checkpoint(tmp_path / "official.pth", tmp_path / "ours.safetensors", **GIVEN)
  for path in ("ours", "ours.safetensors"):
    params = reading.load_params(tmp_path / path, abstract)
    jax.tree.map(np.testing.assert_array_equal, params, mapping.params_from_torch(tensors, g))
    assert all(
      x.sharding == like.sharding
      for x, like in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True)
    )
    with pytest.raises(ValueError, match="holds no ema_params"):
      reading.load_params(tmp_path / path, abstract, which="ema_params")
    with pytest.raises(
      ValueError, match="does not fit.*in the checkpoint alone: params/text_encoder"
    ):
      reading.load_params(
        tmp_path / path, {name: x for name, x in abstract.items() if name != "text_encoder"}
      )
  with pytest.raises(
    ValueError, match="official.pth holds PyTorch weights; make a checkpoint of it"
  ):
    reading.load_params(tmp_path / "official.pth", abstract)
  assert json.loads((tmp_path / "ours" / "model.json").read_text()) == g
  assert infer_geometry({name: x.shape for name, x in tensors.items()}, **GIVEN) == g


def test_leaves_are_made_one_after_the_other_and_tied_copies_forgotten(tmp_path, monkeypatch):
  """Only the leaves of one batch, and the tensor that one of them comes from, are in memory."""
  source = save(tmp_path / "official.pth", state_dict("caption"))
  alive = []
  most = [0]
  monkeypatch.setattr(storage, "_BATCH_LEAVES", 1)
  make = importer._make

  def watched(*args):
    leaf = make(*args)
    alive.append(weakref.ref(leaf))
    most[0] = max(most[0], sum(ref() is not None for ref in alive))
    return leaf

  monkeypatch.setattr(importer, "_make", watched)
  importer.convert_checkpoint(source, tmp_path / "ours", **GIVEN)
  assert len(alive) > 100
  assert most[0] <= 2


def test_transposed_matrices_of_every_size_are_copied_whole():
  for shape in ((1, 1), (5, 16), (40, 33), (3, 100)):
    x = np.random.default_rng(0).standard_normal(shape[::-1]).astype(np.float32).T
    to = np.zeros(shape, np.float16)
    importer._copy(x, to)
    np.testing.assert_array_equal(to, x.astype(np.float16))


def test_bytes_of_tied_copies_count_not_their_values(tmp_path):
  """NaN keeps its bytes."""
  tensors = state_dict("caption")
  words = "text_decoder.bert.embeddings.word_embeddings.weight"
  tensors[words][0, 0] = np.nan
  importer.convert_checkpoint(save(tmp_path / "official.pth", tensors), tmp_path / "ours", **GIVEN)
  assert np.isnan(
    reading.load_arrays(tmp_path / "ours", "params/text_decoder")["embeddings/word/embedding"][0, 0]
  )


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_one_file_holds_what_the_folder_does(task, tmp_path):
  source = save(tmp_path / "official.pth", state_dict(task))
  manifest = importer.convert_checkpoint(source, tmp_path / "folder", keep_dead=True, **GIVEN)
  importer.convert_checkpoint(source, tmp_path / "file.safetensors", keep_dead=True, **GIVEN)
  leaves = {
    f"{tree}/{path}": x
    for tree in ("params", "ema_params", "extra")
    for path, x in reading.load_arrays(tmp_path / "folder", tree).items()
  }
  dead_ones = {
    f"dead/{name}": x for name, x in read(tmp_path / "folder" / "dead_weights.safetensors").items()
  }
  assert_same_bytes(read(tmp_path / "file.safetensors"), leaves | dead_ones)
  for path in ("folder", "file.safetensors"):
    assert storage.read_description(tmp_path / path) == (manifest["geometry"], manifest)
    assert (
      reading.array_shapes(tmp_path / path).items()
      >= {name: x.shape for name, x in leaves.items()}.items()
    )
    part = reading.load_arrays(tmp_path / path, "params/text_encoder")
    assert_same_bytes(
      {f"params/text_encoder/{name}": x for name, x in part.items()},
      {name: x for name, x in leaves.items() if name.startswith("params/text_encoder/")},
    )
    assert reading.load_arrays(tmp_path / path, "params/nothing") == {}
  with open.open_tensors(tmp_path / "file.safetensors") as file:
    assert file.metadata.keys() == {"geometry", "manifest"}


class State(NamedTuple):
  """The fields of a TrainState that `init_from` reads and replaces."""

  params: dict
  ema_params: dict

  def replace(self, **values):
    return self._replace(**values)


@pytest.mark.parametrize("converted", ["ours", "ours.safetensors"])
def test_a_run_starts_from_either_form(converted, tmp_path):
  tensors = state_dict("vqa")
  position = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  importer.convert_checkpoint(
    save(tmp_path / "official.pth", tensors), tmp_path / converted, **GIVEN
  )
  expected = [
    mapping.params_from_torch(tensors, geometry(), momentum, dtype=np.float32)
    for momentum in (False, True)
  ]
  zeros = jax.tree.map(lambda x: jax.device_put(np.zeros_like(x), position), expected[0])
  options = ml_collections.ConfigDict(
    {"paths": (str(tmp_path / converted),), "new": (), "unused": (), "copies": ()}
  )
  state, report = warm_start.init_from(State(zeros, zeros), options)
  jax.tree.map(np.testing.assert_array_equal, [state.params, state.ema_params], expected)
  assert set(report.values()) == {str(tmp_path / converted)}


STYLES = {
  "pre-training": (
    ("text_encoder.", "text_encoder.bert."),
    ("fusion_encoder.", "fusion_encoder.fusion."),
  ),
  "masked language model": (
    ("fusion_encoder.", "fusion_encoder.bert."),
    ("text_encoder_m.", "text_encoder_m.bert."),
    ("fusion_encoder_m.", "fusion_encoder_m.bert."),
  ),
  "distributed": (("", "module."),),
  "ModelScope": (("", "model."),),
  "distributed pre-training": (
    ("text_encoder.", "text_encoder.bert."),
    ("fusion_encoder.", "fusion_encoder.fusion."),
    ("", "module."),
  ),
}


@pytest.mark.parametrize("style", STYLES)
def test_naming_styles_give_the_same_parameters(style):
  tensors = state_dict("vqa", large=True)
  names = {}
  for name in tensors:
    renamed = name
    for old, new in STYLES[style]:
      renamed = new + renamed[len(old) :] if renamed.startswith(old) else renamed
    names[renamed] = name
  assert names.keys() != tensors.keys()
  assert {official_name(renamed): name for renamed, name in names.items()} == {
    n: n for n in tensors
  }
  assert official_names(names) == {name: renamed for renamed, name in names.items()}


@pytest.mark.parametrize("wrapper", ["model", "module", ""])
def test_wrappers(wrapper, tmp_path):
  tensors = state_dict("videocap")
  importer.convert_checkpoint(
    save(tmp_path / "w.pth", tensors, wrapper=wrapper), tmp_path / "ours", **GIVEN
  )
  leaves = reading.load_arrays(tmp_path / "ours", "params")
  np.testing.assert_array_equal(
    leaves["visual_encoder/class_embedding"], tensors["visual_encoder.visual.class_embedding"]
  )


def test_clip_alone_fills_the_image_encoder(tmp_path):
  clip = {
    name.removeprefix("visual_encoder."): x
    for name, x in state_dict("caption").items()
    if name.startswith("visual_encoder.")
  }
  importer.convert_checkpoint(
    save(tmp_path / "clip.pt", clip, wrapper=""), tmp_path / "ours", image_size=32
  )
  leaves = reading.load_arrays(tmp_path / "ours", "params")
  assert {path.split("/")[0] for path in leaves} == {"visual_encoder"}
  assert leaves["visual_encoder/position_embedding"].shape == (17, 64)
  importer.convert_checkpoint(tmp_path / "clip.pt", tmp_path / "zero", zero_positions=True)
  assert not reading.load_arrays(tmp_path / "zero", "params")[
    "visual_encoder/position_embedding"
  ].any()


def test_a_run_goes_to_torch_and_back(tmp_path):
  """A run folder becomes the official VQA model, and its parameters come back."""
  g = geometry()
  tensors = state_dict("vqa")
  params = mapping.params_from_torch(tensors, g, dtype=np.float32)
  manager = manager_lib.Manager(tmp_path / "run")
  manager.save(1, {"params": params, "ema_params": ()}, {"step": 1})
  manager.close()
  model = g | {"vocab_size": 0, "fusion": "released", "vision_heads": 0}
  (tmp_path / "run" / "config.json").write_text(
    json.dumps({"task": {"name": "vqa"}, "model": model})
  )
  manifest = exporter.export_torch(tmp_path / "run", tmp_path / "run.pth")
  assert {
    row["why"] for row in manifest["tensors"] if row["name"].startswith("text_encoder_m.encoder")
  } == {"copied from the online weights: the checkpoint has no average"}
  exported = read(tmp_path / "run.pth")
  assert exported.keys() == official_inventory.inventory("vqa", g).keys()
  jax.tree.map(np.testing.assert_array_equal, mapping.params_from_torch(exported, g), params)


@pytest.mark.parametrize(("run_task", "task"), [("retrieval", "retrieval"), ("scst", "caption")])
def test_runs_keep_their_queues_and_know_their_official_model(run_task, task, tmp_path):
  g = geometry()
  tensors = state_dict(task)
  queues = {
    name: tensors[name]
    for name in ("image_queue", "text_queue", "idx_queue", "queue_ptr")
    if name in tensors
  }
  converted = {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in queues.items()}
  manager = manager_lib.Manager(tmp_path / "run")
  manager.save(
    1,
    {
      "params": mapping.params_from_torch(tensors, g, dtype=np.float32),
      "ema_params": (),
      "extra": converted or (),
    },
    {},
  )
  manager.close()
  model = g | {"vocab_size": 0, "fusion": "released", "vision_heads": 0}
  (tmp_path / "run" / "config.json").write_text(
    json.dumps({"task": {"name": run_task}, "model": model})
  )
  assert exporter.export_torch(tmp_path / "run", tmp_path / "run.pth")["task"] == task
  exported = read(tmp_path / "run.pth")
  assert exported.keys() == official_inventory.inventory(task, g).keys()
  assert_same_bytes({name: exported[name] for name in queues}, queues)


# ---- refusals


def refused(tensors, tmp_path, message, **options):
  path = save(tmp_path / "bad.pth", tensors)
  with pytest.raises(ValueError, match=message):
    importer.convert_checkpoint(path, tmp_path / "ours", **GIVEN | options)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pth"]


def test_mistakes_are_counted_and_grouped(tmp_path):
  tensors = state_dict("caption")
  key = "text_decoder.bert.encoder.layer.1.intermediate.dense.weight"
  without = {name: x for name, x in tensors.items() if name != key}
  refused(without, tmp_path, r"1 leaves missing: text_decoder/layers/intermediate")
  refused(
    without | {key.replace("intermediate", "intermediatd"): tensors[key]},
    tmp_path,
    r"1 unknown tensors: text_decoder.bert.encoder.layer.\d.*; 1 leaves missing: "
    r"text_decoder/layers/intermediate",
  )
  refused(
    tensors | {key: tensors[key].T},
    tmp_path,
    r"1 tensors of another shape: text_decoder.bert.encoder",
  )
  unfused = {n: x for n, x in tensors.items() if not n.startswith("fusion_encoder.encoder.layer.")}
  refused(unfused, tmp_path, "1 leaves missing: fusion_encoder")
  refused(
    tensors
    | {
      "text_decoder.cls.predictions.decoder.weight": tensors[
        "text_decoder.cls.predictions.decoder.weight"
      ]
      + 1
    },
    tmp_path,
    "are one tensor in the official model, but their values differ",
  )
  refused(
    tensors | {f"module.{key}": tensors[key]},
    tmp_path,
    "1 tensors have two names, for example .* and module",
  )
  refused({"weight": np.zeros((3, 4), np.float32)}, tmp_path, "fit no known format")
  refused(tensors, tmp_path, "leaves missing: .*fusion_encoder/layer_", fusion_layers=5)
  refused(
    tensors,
    tmp_path,
    "--image_size=20 is no multiple of the image encoder's patch size 8",
    image_size=20,
  )


@pytest.mark.parametrize("converted", ["ours", "ours.safetensors"])
def test_a_leaf_that_cannot_be_made_leaves_nothing(converted, tmp_path, monkeypatch):
  """The error comes after half of the leaves; its cause is reported."""
  source = save(tmp_path / "official.pth", state_dict("caption"))
  calls = []
  make = importer._make

  def broken(*args):
    calls.append(args)
    if len(calls) == 60:
      raise ValueError("the file ends inside this tensor")
    return make(*args)

  monkeypatch.setattr(importer, "_make", broken)
  with pytest.raises(ValueError, match="^the file ends inside this tensor$"):
    importer.convert_checkpoint(source, tmp_path / converted, **GIVEN)
  assert [p.name for p in tmp_path.iterdir()] == ["official.pth"]


def test_a_failed_export_keeps_the_old_files(tmp_path, monkeypatch):
  importer.convert_checkpoint(
    save(tmp_path / "official.pth", state_dict("caption")), tmp_path / "ours.safetensors", **GIVEN
  )
  exporter.export_torch(tmp_path / "ours.safetensors", tmp_path / "back.pth", slim=True)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  monkeypatch.setattr(official_inventory, "initial", lambda *unused: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    exporter.export_torch(tmp_path / "ours.safetensors", tmp_path / "back.pth")
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
  with pytest.raises(ValueError, match="is the checkpoint itself"):
    exporter.export_torch(tmp_path / "ours.safetensors", tmp_path / "ours.safetensors")
  with pytest.raises(ValueError, match="is already a converted checkpoint"):
    importer.convert_checkpoint(tmp_path / "ours.safetensors", tmp_path / "again")


def test_the_commands(tmp_path, capsys):
  source = save(tmp_path / "official.pth", state_dict("vqa"))
  flags = ["--heads=2", "--fusion_layers=2", "--stride=1", "--dtype=float32"]
  assert convert_tool.main([str(source), str(tmp_path / "ours"), *flags]) == 0
  out = capsys.readouterr().out
  assert "mapped" in out
  assert "CLIP's text tower, never run" in out
  assert "geometry:" in out
  assert f"manifest: {tmp_path}/ours/manifest.json" in out
  assert (
    convert_tool.main(
      [str(source), str(tmp_path / "x.safetensors"), *flags, "--verbose", "--image_size=32"]
    )
    == 0
  )
  lines = capsys.readouterr().out.splitlines()
  assert f"manifest: in the metadata of {tmp_path}/x.safetensors" in lines
  described = {line.split(" ")[0]: line for line in lines}
  assert described.keys() >= state_dict("vqa").keys()
  for key, what in (
    (
      "text_encoder.encoder.layer.1.output.dense.bias",
      "-> params/text_encoder/layers/output/bias[1]",
    ),
    (
      "text_encoder_m.encoder.layer.1.output.dense.bias",
      "-> ema_params/text_encoder/layers/output/bias[1]",
    ),
    (
      "visual_encoder.visual.positional_embedding",
      "/position_embedding (resized from 5 to 17 positions)",
    ),
    (
      "fusion_encoder.encoder.layer.0.output.dense.bias",
      "dead: a stored fusion layer that never runs",
    ),
    ("text_decoder.cls.predictions.decoder.bias", "tied: text_decoder.cls.predictions.bias"),
  ):
    assert described[key].endswith(what), described[key]
  assert convert_tool.main([str(source), str(tmp_path / "ours"), *flags]) == 1
  assert "exists already" in capsys.readouterr().err
  assert convert_tool.main([str(tmp_path / "none.pth"), str(tmp_path / "x")]) == 1
  assert "none.pth" in capsys.readouterr().err
  assert (
    export_tool.main([str(tmp_path / "ours"), str(tmp_path / "back.pth"), "--dtype=float16"]) == 0
  )
  out = capsys.readouterr().out
  assert "official initialisation" in out
  assert f"manifest: {tmp_path}/back.pth.manifest.json" in out
  rows = json.loads((tmp_path / "back.pth.manifest.json").read_text())["tensors"]
  assert {row["name"]: (tuple(row["shape"]), row["dtype"]) for row in rows} == {
    name: (x.shape, str(x.dtype)) for name, x in read(tmp_path / "back.pth").items()
  }
  assert {
    x.dtype for name, x in read(tmp_path / "back.pth").items() if "position_ids" not in name
  } == {np.dtype(np.float16)}
  assert export_tool.main([str(tmp_path), str(tmp_path / "no.pth")]) == 1
  assert str(tmp_path) in capsys.readouterr().err
  assert not (tmp_path / "no.pth").exists()
  assert (
    export_tool.main([str(tmp_path / "ours"), str(tmp_path / "no.pth"), "--task=retrieval"]) == 1
  )
  assert "pass the task that it was trained for" in capsys.readouterr().err
