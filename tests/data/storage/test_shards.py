"""Shards of image-text pairs: their indices, damage, remote files, conversion, and runs on them."""

import importlib
import io
import itertools
import json
import os
import pathlib
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data import check, pipeline
from mplug_jax.data.errors import ImageError
from mplug_jax.data.examples import retrieval
from mplug_jax.data.images import reader as image_reader
from mplug_jax.data.sources import caption as caption_lib
from mplug_jax.data.sources import mixture
from mplug_jax.data.storage import remote as storage
from mplug_jax.data.storage import shards, tar_index
from mplug_jax.data.text import sentencepiece, tokenizer
from mplug_jax.training import loop
from tests.support import shard_files, tiny_run, vqa_files
from tests.support.shard_files import caption, numbered, pair, picture, tar_bytes
from tools import prepare_data

CONFIGS = tiny_run.ROOT / "configs" / "x.py"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  """A place of their own for indices and compiled programs."""
  with (
    vqa_files.quick_runs(tmp_path_factory.getbasetemp() / "compiled_shards") as folder,
    pytest.MonkeyPatch.context() as patch,
  ):
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield folder


@pytest.fixture
def pattern(tmp_path):
  """Three tars of 1, 7 and 3 pairs, numbered from 0."""
  return shard_files.write(tmp_path / "pairs")


@pytest.fixture
def records(pattern, tmp_path):
  """The same pairs in ArrayRecord files of four."""
  assert (
    prepare_data.main(
      ["shards", pattern, f"--out={tmp_path}/records", "--records_per_shard=4", "--workers=1"]
    )
    == 0
  )
  return f"{tmp_path}/records/*.array_record"


def content(source):
  """[(encoded image, caption)]; an image that cannot be read is None."""
  return [
    (None if isinstance(r["image"], ImageError) else r["image"], *r["captions"])
    for r in map(source.__getitem__, range(len(source)))
  ]


def expected(count):
  return [(picture(i), caption(i).lower()) for i in range(count)]


def config(name, arg, **changes):
  c = importlib.import_module(f"configs.{name}").get_config(f"tiny,{arg}")
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return c


# ---- pairs


def test_pairs_come_as_they_were_written(pattern, records, tmp_path):
  tars, converted = shards.load([pattern]), shards.load([records])
  assert content(tars) == content(converted) == expected(11)
  assert tars[8]["image_id"] == f"{tmp_path}/pairs/00002.tar/00008"
  assert (
    converted[8]["image_id"] == f"{tmp_path}/records/pairs-00002-of-00003.array_record/00002/00008"
  )
  assert len({source[i]["image_id"] for source in (tars, converted) for i in range(11)}) == 22
  both = shards.load([records, *[f"{tmp_path}/pairs/*1.tar"] * 2])
  assert content(both) == expected(11) + expected(8)[1:] * 2
  assert both.counts().tolist() == [1] * 25
  for index in (-1, 25):
    with pytest.raises(IndexError, match="not among the 25"):
      both[index]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_texts_of_many_kinds(tmp_path, form):
  long = f"{'folder/' * 20}{'x' * 90}"
  members = {
    "./a/0": pair(0),
    "b.c/1": pair(1, json=None),
    "2": pair(2, txt=None),
    long: pair(3),
    "4": pair(4, jpg=None, PNG=picture(4, "PNG")),
    "é": pair(5, txt=b"  A \n\n dog\t"),
    "6": {"txt": b"Text first", **pair(6, txt=None)},
    "7": pair(7, txt=b"", cls=b"1"),
  }
  (tmp_path / "x.tar").write_bytes(tar_bytes(members, form))
  source = shards.load([f"{tmp_path}/x.tar"])
  assert [
    record["image_id"].removeprefix(f"{tmp_path}/x.tar/")
    for record in map(source.__getitem__, range(8))
  ] == list(members)
  assert [source.captions(i)[0] for i in (0, 2, 3, 5, 6, 7)] == [
    caption(0).lower(),
    caption(2).lower(),
    caption(3).lower(),
    "a dog",
    "text first",
    caption(7).lower(),
  ]
  assert source[4]["image"] == picture(4, "PNG")


def test_what_is_no_pair_is_counted_and_left_out(tmp_path, caplog):
  members = numbered(range(8)) | {
    "00001": pair(1, jpg=None),
    "00003": pair(3, txt=None, json=None),
    "00004": pair(4, jpg=b""),
  }
  path = tmp_path / "x.tar"
  path.write_bytes(
    tar_bytes(
      [(f"{key}.{end}", data) for key, group in members.items() for end, data in group.items()]
      + [("README", b"x"), ("folder/.hidden", b"x")]
    )
  )
  source = shards.load([str(path)])
  assert [record[1] for record in content(source)] == [caption(i).lower() for i in (0, 2, 5, 6, 7)]
  assert source.left_out == (
    f"Keys without an image: 2 left out, the first {path}/00001.",
    f"Keys without a text: 1 left out, the first {path}/00003.",
  )
  assert [record.getMessage() for record in caplog.records] == list(source.left_out)
  tiny_run.refused(
    lambda: shards.load([str(path)], strict=True),
    "Keys without an image: 2 left out",
    "config.data.strict=True",
  )
  path.write_bytes(tar_bytes([(name, b"x") for name in ("0.jpg", "1.jpg", "0.txt", "1.txt")]))
  tiny_run.refused(
    lambda: shards.load([str(path)]),
    "there is no pair of an image and a text",
    "without an image: 2",
    "without a text: 2",
  )


def test_pairs_that_cannot_be_used_are_counted_by_the_reader(tmp_path):
  members = {
    "0": pair(0),
    "1": pair(1, jpg=b"no image"),
    "2": pair(2, txt=b"\xff"),
    "3": pair(3, txt=b" \n"),
    "4": pair(4, txt=None, json=b'{"caption": null}'),
    "5": pair(5, txt=None, json=b"[1"),
    "6": pair(6, txt=None, json=b"[1]"),
  }
  (tmp_path / "x.tar").write_bytes(tar_bytes(members))
  source, reader = shards.load([f"{tmp_path}/x.tar"]), image_reader.ImageReader(8)
  assert [reader(source[i]["image"], source[i]["image_id"])[1] for i in range(7)] == [False] + [
    True
  ] * 6
  assert [source.captions(i) for i in (2, 3, 4)] == [[""]] * 3
  strict = image_reader.ImageReader(8, strict=True)
  messages = (
    f"Image {tmp_path}/x.tar/1 cannot be read: not an image",
    f"Pair 2 of {tmp_path}/x.tar cannot be used: its text is no UTF-8.",
    "its caption is empty.",
    "its caption is no text.",
    "no json object with a caption.",
  )
  for index, message in enumerate(messages, 1):
    tiny_run.refused(
      lambda index=index: strict(source[index]["image"], source[index]["image_id"]), message
    )


def test_the_check_of_a_config_opens_the_images_of_shards(tmp_path):
  members = numbered(range(4)) | {"00001": pair(1, jpg=b"no image"), "00002": pair(2, txt=b" ")}
  (tmp_path / "x.tar").write_bytes(tar_bytes(members))
  report = check.check(config("caption", f"data=shards:{tmp_path}/x.tar"))
  assert (report.records, report.images, report.missing) == (4, 4, [])
  assert len(report.samples) == 2
  assert report.corrupt == [
    f"Image of record {tmp_path}/x.tar/00001 cannot be read: not an image of a known format.",
    f"Pair 00002 of {tmp_path}/x.tar cannot be used: its caption is empty.",
  ]


# ---- indices


def test_an_index_is_kept_until_the_tar_changes(pattern, tmp_path, monkeypatch):
  assert len(shards.load([pattern])) == 11
  monkeypatch.setattr(tar_index, "_make", None)
  assert content(shards.load([pattern])) == expected(11)
  monkeypatch.undo()
  path = tmp_path / "pairs" / "00001.tar"
  path.write_bytes(tar_bytes(numbered(range(50, 52))))
  assert [text for _, text in content(shards.load([str(path)]))] == [
    caption(50).lower(),
    caption(51).lower(),
  ]
  kept = tar_index._cache_file(str(path))
  for damage in (b"", b"PK\x03\x04 damaged", (tmp_path / "pairs" / "00000.tar").read_bytes()):
    with open(kept, "wb") as file:
      file.write(damage)
    assert len(shards.load([str(path)])) == 2
  monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
  assert len(shards.load([pattern])) == 6


def test_an_index_is_small(tmp_path):
  (tmp_path / "x.tar").write_bytes(tar_bytes(numbered(range(200))))
  (index,) = tar_index.load([f"{tmp_path}/x.tar"])
  assert len(pickle.dumps(index)) < 45 * 200


def test_a_tar_that_is_cut_off_gives_what_is_before(tmp_path):
  content_bytes = tar_bytes(numbered(range(6)))
  path = tmp_path / "x.tar"
  with tarfile.open(fileobj=io.BytesIO(content_bytes)) as tar:
    starts = [member.offset for member in tar.getmembers()]
  assert len(starts) == 18
  for size, pairs, last in (
    (starts[10] + 520, 3, "00003.jpg"),
    (starts[11] + 520, 4, "00003.json"),
    (starts[12] + 100, 4, "00003.txt"),
  ):
    path.write_bytes(content_bytes[:size])
    source = shards.load([str(path)])
    assert [text for _, text in content(source)] == [caption(i).lower() for i in range(pairs)]
    assert source.left_out[0].startswith(f"{path} is cut off ")
    assert f"its last good member is {last}." in source.left_out[0]
    tiny_run.refused(lambda: shards.load([str(path)], strict=True), f"{path} is cut off")
  path.write_bytes(content_bytes[: starts[12]])  # without its end, but at the end of a pair
  assert shards.load([str(path)]).left_out == ()
  assert len(shards.load([str(path)])) == 4
  damaged = bytearray(content_bytes)
  damaged[starts[9] + 3] ^= 1
  path.write_bytes(damaged)
  assert (
    f"is damaged at byte {starts[9]}; its last good member is 00002.txt."
    in shards.load([str(path)]).left_out[0]
  )


def test_files_that_are_no_shards(tmp_path, records):
  def load(name, content=None):
    if content is not None:
      (tmp_path / name).write_bytes(content)
    return lambda: shards.load([f"{tmp_path}/{name}"])

  tiny_run.refused(
    load("x.tar", b"no tar" * 500), "x.tar is not a tar file, or is cut off (is damaged at byte 0)"
  )
  tiny_run.refused(load("x.tar", b""), "x.tar: there is no pair")
  tiny_run.refused(
    load("x.tar", b"\x1f\x8b" + b"x" * 2000), "x.tar is a compressed tar", "unpack it"
  )
  tiny_run.refused(load("none.tar"), "none.tar does not exist.")
  tiny_run.refused(load("{00..02}.tar"), "00.tar does not exist.")
  tiny_run.refused(load("none*.tar"), "No file matches", "none*.tar.")
  tiny_run.refused(
    load("x.array_record", b"x" * 1000), "x.array_record is no complete ArrayRecord file ("
  )
  complete = pathlib.Path(storage.expand(records)[0]).read_bytes()
  tiny_run.refused(
    load("x.array_record", complete[:-70_000]), "x.array_record is no complete ArrayRecord file ("
  )
  tiny_run.refused(
    lambda: shards.load(["s3://bucket/x.array_record"]),
    "ArrayRecord files are read from a disk or gs:// only",
  )


def test_records_of_others_that_cannot_be_used(tmp_path):
  import msgpack
  from array_record.python import array_record_module

  good = {"key": "a", "image": picture(0), "caption": "A dog"}
  rows = [good, good | {"caption": " "}, good | {"image": "x"}, {"key": "b"}, [1]]
  writer = array_record_module.ArrayRecordWriter(
    f"{tmp_path}/x.array_record-00000-of-00001", "group_size:1"
  )
  for row in (*map(msgpack.packb, rows), b"\xc1", b""):
    writer.write(row)
  writer.close()
  source = shards.load([f"{tmp_path}/x.array_record-*"])
  assert content(source) == [(picture(0), "a dog")] + [(None, "")] * 6
  for index, message in (
    (1, "its caption is empty"),
    (2, "its image is not bytes"),
    (3, "no map with image, caption and key"),
  ):
    assert f"Pair record {index} of {tmp_path}/x.array_record-00000-of-00001 cannot be" in str(
      source[index]["image"]
    )
    assert message in str(source[index]["image"])


def test_patterns(tmp_path):
  names = ["a-08.tar", "a-09.tar", "a-10.tar", "b-x.tar", "[c].tar"]
  for name in names:
    (tmp_path / name).touch()
  for pattern, found in (
    ("a-{08..10}.tar", names[:3]),
    ("{b-x,a-09}.tar", ["b-x.tar", "a-09.tar"]),
    ("a-*.tar", names[:3]),
    ("{a,b}-[0x]*.tar", ["a-08.tar", "a-09.tar", "b-x.tar"]),
    ("[c].tar", ["[c].tar"]),
  ):
    assert storage.expand(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{name}" for name in found]


# ---- threads, processes, other file systems


def test_shards_on_another_file_system(pattern, tmp_path):
  memory = fsspec.filesystem("memory")
  for name in os.listdir(tmp_path / "pairs"):
    memory.pipe(f"/bucket/{name}", (tmp_path / "pairs" / name).read_bytes())
  for remote in ("memory://bucket/{00000..00002}.tar", "memory://bucket/*.tar"):
    source = shards.load([remote])
    assert content(source) == expected(11)
    assert source[1]["image_id"].startswith("memory://")
    assert source[1]["image_id"].endswith("/00001.tar/00001")
    assert content(pickle.loads(pickle.dumps(source))) == expected(11)
  memory.pipe("/bucket/00001.tar", tar_bytes(numbered(range(20, 22))))
  assert [text for _, text in content(shards.load(["memory://bucket/00001.tar"]))] == [
    caption(20).lower(),
    caption(21).lower(),
  ]
  memory.rm("/bucket", recursive=True)
  tiny_run.refused(
    lambda: shards.load(["memory://bucket/00001.tar"]), "memory://bucket/00001.tar does not exist."
  )
  tiny_run.refused(
    lambda: shards.load(["nosuch://bucket/x.tar"]),
    "nosuch://bucket/x.tar cannot be read: Protocol not known",
  )


def test_sources_can_be_sent_and_shared(pattern, records):
  for source in (shards.load([pattern]), shards.load([records])):
    sent = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
      assert all(found == expected(11) for found in pool.map(content, [sent] * 16))


def numbers(index, record, rng):
  """A transform that keeps what tells records apart."""
  return {
    "index": np.int32(index),
    "id": np.int32(record["id"]),
    "size": np.int32(len(record["image"])),
    "draw": rng.random(),
  }


@pytest.mark.parametrize("block", [0, 2])
def test_any_number_of_processes_shares_uneven_shards_and_resumes(pattern, records, block):
  """Two processes read the same global batches as one, from any step on.

  Of one shard, and of three shards with 1, 7 and 3 pairs.
  """

  def batches(source, count, **options):
    found = pipeline.train_batches(
      source, numbers, batch_size=4, seed=5, threads=0, block=block, **options
    )
    out = list(itertools.islice(found, count))
    found.close()
    return out

  for name in (pattern, records):
    source = retrieval.Pairs(shards.load([name]))
    whole = batches(source, 12)
    assert sorted(np.concatenate([batch["id"] for batch in whole])[:11]) == list(range(11))
    for start in (1, 3, 7):
      halves = [
        batches(source, 12 - start, process_index=p, process_count=2, start_step=start)
        for p in (0, 1)
      ]
      for expected_batch, *parts in zip(whole[start:], *halves, strict=True):
        for key, value in expected_batch.items():
          np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)


def test_worker_processes_read_shards(records):
  found = pipeline.train_batches(
    retrieval.Pairs(shards.load([records])), numbers, batch_size=11, seed=0, workers=1
  )
  assert sorted(next(found)["id"]) == list(range(11))
  found.close()


# ---- conversion


def test_a_conversion_leaves_bad_pairs_out_and_goes_on(tmp_path, capsys):
  pattern = shard_files.write(tmp_path / "pairs", (3, 4))
  members = numbered(range(7, 10)) | {
    "00008": pair(8, txt=b" "),
    "00009": pair(9, jpg=picture(9)[:300]),
  }
  (tmp_path / "pairs" / "00002.tar").write_bytes(tar_bytes(members | {"00010": pair(10, jpg=None)}))
  command = [
    "shards",
    pattern,
    f"{tmp_path}/pairs/*2.tar",
    f"--out={tmp_path}/out",
    "--records_per_shard=4",
    "--workers=1",
    "--verify",
  ]
  assert prepare_data.main(command) == 0
  out = capsys.readouterr().out.splitlines()
  assert out[:3] == [
    "pairs-00000-of-00003.array_record  4 pairs",
    "pairs-00001-of-00003.array_record  4 pairs",
    "pairs-00002-of-00003.array_record  0 pairs, 2 bad",
  ]
  assert f"Keys without an image: 1 left out, the first {tmp_path}/pairs/00002.tar/00010." in out[3]
  assert "Pair 00008" in out[4]
  assert f"Image {tmp_path}/pairs/00002.tar/00009 cannot be read" in out[5]
  assert "8 pairs in 3 files, 2 bad pairs left out" in out
  assert f"data=shards:{tmp_path}/out/*.array_record" in out[-1]
  assert content(shards.load([f"{tmp_path}/out/*.array_record"])) == expected(8)

  first = (tmp_path / "out" / "pairs-00000-of-00003.array_record").stat().st_mtime_ns
  (tmp_path / "out" / "pairs-00001-of-00003.array_record").unlink()
  assert prepare_data.main(command) == 0
  assert capsys.readouterr().out.splitlines() == out
  assert (tmp_path / "out" / "pairs-00000-of-00003.array_record").stat().st_mtime_ns == first
  assert content(shards.load([f"{tmp_path}/out/*.array_record"])) == expected(8)
  assert prepare_data.main([*command[:-1]]) == 1
  assert "holds the conversion of other shards" in capsys.readouterr().err


def test_what_cannot_be_converted(tmp_path, capsys, pattern):
  assert prepare_data.main(["shards", f"{tmp_path}/none.tar", f"--out={tmp_path}/out"]) == 1
  assert capsys.readouterr().err == f"error: {tmp_path}/none.tar does not exist.\n"
  assert prepare_data.main(["shards", pattern, "--out=gs://bucket/out"]) == 1
  assert prepare_data.main(["check", pattern, "--task=pretrain"]) == 1
  assert "which the command shards --verify checks" in capsys.readouterr().err


# ---- configs and runs


def test_shards_and_files_mix_by_weight(pattern, records, tmp_path):
  (tmp_path / "a.png").write_bytes(picture(0, "PNG"))
  (tmp_path / "own.json").write_text(json.dumps([{"image": "a.png", "caption": ["one", "two"]}]))
  c = config("pretrain", f"data=shards:{pattern},root={tmp_path}").unlock()
  c.data.train_files = (pattern, records, f"{tmp_path}/own.json")
  source = data.get_source(c, "train")
  assert isinstance(source, mixture.Mixture)
  assert [len(part) for part in source.sources] == [
    11,
    11,
    2,
  ]
  assert [source[i]["id"] for i in range(24)] == [*range(22), 22, 22]
  c.data.weights = (1, 1, 2)
  source = data.get_source(c, "train")
  assert len(source) == 44
  sentencepiece.train_sentencepiece(data.texts(c, source), 120, tmp_path / "tokenizer")
  transform = data.make_transform(c, tokenizer.load(tmp_path / "tokenizer"), train=True)
  found = pipeline.train_batches(source, transform, batch_size=44, seed=0)
  batch = next(found)
  found.close()
  assert {"image", "masked", "target"} <= batch.keys()
  assert not batch["corrupt"].any()
  assert set(batch["id"].tolist()) == set(range(23))
  c = config("caption", f"data=shards:{pattern},root={tmp_path}").unlock()
  c.data.train_files = (pattern, f"{tmp_path}/own.json")
  tiny_run.refused(
    lambda: data.get_source(c, "train"),
    "are shards and other files together; only configs/pretrain.py mixes them",
  )
  c.data.train_files, c.data.fields = (pattern,), "caption=text"
  tiny_run.refused(
    lambda: data.get_source(c, "train"),
    "config.data.fields cannot rename members and keys of shards",
  )


def test_the_config_argument(tmp_path):
  c = config("retrieval", "data=shards:/data/train/cc-{00..11}.tar")
  assert (c.data.train_files, c.data.val_file) == (
    ("/data/train/cc-{00..11}.tar",),
    "/data/val/cc-{00..11}.tar",
  )
  c = config("pretrain", "data=shards:gs://bucket/x-*.array_record")
  assert (c.data.name, c.data.train_files, c.data.test_file) == (
    "shards",
    ("gs://bucket/x-*.array_record",),
    "",
  )
  tiny_run.refused(lambda: caption_lib.images(c.data, "test"), "data.test_file is not set")
  pattern = shard_files.write(tmp_path / "pairs")
  c = config("caption", f"data=shards:{pattern}", data__val_file=f"{tmp_path}/pairs/00001.tar")
  tiny_run.refused(
    lambda: data.get_source(c, "train"),
    "config.data.train_files and config.data.val_file both name",
    "00001.tar",
  )


@pytest.mark.parametrize(
  ("name", "metric"),
  [
    ("caption", "CIDEr-D"),
    *(pytest.param(name, "r_mean", marks=pytest.mark.slow) for name in ("retrieval", "pretrain")),
  ],
)
def test_a_run_on_shards(name, metric, pattern, records, tmp_path, cache, capsys):
  test = shard_files.write(tmp_path / "test", (2, 3), first=40)
  c = config(
    name,
    f"data=shards:{pattern if name == 'caption' else records}",
    data__test_file=test,
    data__shuffle_block=2,
    model__image_size=32,
    compilation_cache=str(cache),
    total_steps=2,
  ).unlock()
  if name == "pretrain":
    c.data.train_files = (pattern, records)
  assert loop.train(c, str(tmp_path / "run")) == 0
  assert capsys.readouterr().out.splitlines()[-1].startswith(f"final: {metric}")
