"""Complete checkpoints are converted, exported and converted again, byte for byte."""

import functools
import json
import weakref

import jax
import numpy as np
import pytest

from mplug_jax.checkpoints import reading
from mplug_jax.conversion import exporter, importer, mapping, storage
from mplug_jax.conversion.geometry import infer_geometry
from mplug_jax.conversion.names import official_name, official_names
from mplug_jax.tensor_files import open
from tests.support.official_state import (
  GIVEN,
  STYLES,
  assert_same_bytes,
  dead,
  geometry,
  read,
  save,
  state_dict,
)
from tools import convert_checkpoint as convert_tool
from tools import export_torch as export_tool


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Returns a function (task, large) -> (tensors, manifest, folder).

  The folder holds the tensors, and their conversions to a folder and to one file.
  """

  @functools.cache
  def make(task, large):
    folder = tmp_path_factory.mktemp(task)
    tensors = state_dict(task, large)
    source = save(folder / "official.pth", tensors)
    for name in ("folder", "file.safetensors"):
      manifest = importer.convert_checkpoint(source, folder / name, keep_dead=True, **GIVEN)
    return tensors, manifest, folder

  return make


@pytest.mark.parametrize(
  ("task", "large", "forms"),
  [
    ("vqa", False, ("folder", "file.safetensors")),
    ("vqa", True, ("file.safetensors",)),
    ("caption", False, ("file.safetensors",)),
    ("retrieval", True, ("folder", "file.safetensors")),
    ("grounding", False, ("file.safetensors",)),
    ("videocap", True, ("file.safetensors",)),
  ],
)
def test_there_and_back_with_every_byte(task, large, forms, made, tmp_path):
  """Both forms where there are averages and queues; other tasks differ in names and shapes only."""
  if "folder" in forms:
    tensors, _, folder = made(task, large)
  else:
    tensors, folder = state_dict(task, large), tmp_path
    source = save(tmp_path / "official.pth", tensors)
    importer.convert_checkpoint(source, tmp_path / "file.safetensors", keep_dead=True, **GIVEN)
  for form in forms:
    manifest = exporter.export_torch(folder / form, tmp_path / f"{form}.pth")
    assert_same_bytes(read(tmp_path / f"{form}.pth"), tensors)
    assert not any("initialisation" in row["why"] for row in manifest["tensors"])


def test_what_never_runs_is_made_again_or_left_out(tmp_path):
  tensors = state_dict("vqa")
  importer.convert_checkpoint(
    save(tmp_path / "official.pth", tensors), tmp_path / "ours.safetensors", **GIVEN
  )
  exporter.export_torch(tmp_path / "ours.safetensors", tmp_path / "full.pth")
  exporter.export_torch(tmp_path / "ours.safetensors", tmp_path / "slim.safetensors", slim=True)
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
    tmp_path / "a.safetensors",
    dtype="float32",
    **GIVEN,
  )
  exporter.export_torch(tmp_path / "a.safetensors", tmp_path / "back.pth")
  importer.convert_checkpoint(tmp_path / "back.pth", tmp_path / "b.safetensors", **GIVEN)
  for which in ("params", "ema_params", "extra"):
    first, second = (reading.load_arrays(tmp_path / f"{name}.safetensors", which) for name in "ab")
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
  with pytest.raises(ValueError, match="official.pth holds PyTorch weights; convert it"):
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
  importer.convert_checkpoint(
    save(tmp_path / "official.pth", tensors),
    tmp_path / "c.safetensors",
    allow_nonfinite=True,
    **GIVEN,
  )
  assert np.isnan(
    reading.load_arrays(tmp_path / "c.safetensors", "params/text_decoder")[
      "embeddings/word/embedding"
    ][0, 0]
  )


@pytest.mark.parametrize(("task", "large"), [("vqa", False), ("retrieval", True)])
def test_one_file_holds_what_the_folder_does(task, large, made):
  _, manifest, tmp_path = made(task, large)
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
    save(tmp_path / "w.pth", tensors, wrapper=wrapper), tmp_path / "c.safetensors", **GIVEN
  )
  leaves = reading.load_arrays(tmp_path / "c.safetensors", "params")
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
    save(tmp_path / "clip.pt", clip, wrapper=""), tmp_path / "c.safetensors", image_size=32
  )
  leaves = reading.load_arrays(tmp_path / "c.safetensors", "params")
  assert {path.split("/")[0] for path in leaves} == {"visual_encoder"}
  assert leaves["visual_encoder/position_embedding"].shape == (17, 64)
  importer.convert_checkpoint(
    tmp_path / "clip.pt", tmp_path / "zero.safetensors", zero_positions=True
  )
  assert not reading.load_arrays(tmp_path / "zero.safetensors", "params")[
    "visual_encoder/position_embedding"
  ].any()


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
  assert "official initialization" in out
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
