"""Shards read by threads, processes and remote file systems; conversion, configs and runs."""

import itertools
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from mplug_jax import data
from mplug_jax.data import pipeline
from mplug_jax.data.examples import retrieval
from mplug_jax.data.sources import caption as caption_lib
from mplug_jax.data.sources import mixture
from mplug_jax.data.storage import shards
from mplug_jax.data.text import sentencepiece, tokenizer
from mplug_jax.training import loop
from tests.support import caption_run, shard_files, tiny_run
from tests.support.shard_files import caption, numbered, pair, picture, tar_bytes
from tests.support.shards_case import config, content, expected
from tools import prepare_data

pytestmark = pytest.mark.usefixtures("drawn_start", "index_cache")


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
      assert all(pairs == expected(11) for pairs in pool.map(content, [sent] * 16))


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
    iterator = pipeline.train_batches(
      source, numbers, batch_size=4, seed=5, threads=0, block=block, **options
    )
    out = list(itertools.islice(iterator, count))
    iterator.close()
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
  batches = pipeline.train_batches(
    retrieval.Pairs(shards.load([records])), numbers, batch_size=11, seed=0, workers=1
  )
  assert sorted(next(batches)["id"]) == list(range(11))
  batches.close()


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
  batches = pipeline.train_batches(source, transform, batch_size=44, seed=0)
  batch = next(batches)
  batches.close()
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
def test_a_run_on_shards(name, metric, pattern, records, tmp_path, capsys):
  test = shard_files.write(tmp_path / "test", (2, 3), first=40)
  c = config(
    name,
    f"data=shards:{pattern if name == 'caption' else records}",
    data__test_file=test,
    data__shuffle_block=2,
    **(
      caption_run.run_settings(tmp_path)
      if name == "caption"
      else {"model__image_size": 32, "compilation_cache": "", "total_steps": 2}
    ),
  ).unlock()
  if name == "caption":  # what a tokenizer is fitted to, unless the config names one as here
    assert [*data.texts(c, data.get_source(c, "train"))] == [caption(i).lower() for i in range(11)]
  if name == "pretrain":
    c.data.train_files = (pattern, records)
  assert loop.train(c, str(tmp_path / "run")) == 0
  assert capsys.readouterr().out.splitlines()[-1].startswith(f"final: {metric}")
