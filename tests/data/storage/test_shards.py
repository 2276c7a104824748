"""Shards of image-text pairs: their indices, damage, remote files, conversion, and runs on them."""

import io
import pathlib
import pickle
import tarfile

import pytest

from mplug_jax.data import check
from mplug_jax.data.images import reader as image_reader
from mplug_jax.data.storage import remote as storage
from mplug_jax.data.storage import shards, tar_index
from tests.support import tiny_run
from tests.support.shard_files import caption, numbered, pair, picture, tar_bytes
from tests.support.shards_case import config, content, expected

pytestmark = pytest.mark.usefixtures("one_device", "index_cache")

CONFIGS = tiny_run.ROOT / "configs" / "x.py"


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
  repeated = "Shards that are named more than once, so that their pairs cannot be told apart: 1, "
  assert both.left_out == (f"{repeated}the first {tmp_path}/pairs/00001.tar.",)
  tiny_run.refused(lambda: shards.load([pattern, pattern], strict=True), repeated[:-3] + "3, ")
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
  assert source.ignored == (
    f"Members that belong to no pair: 3 ignored, the first {path}/00004.jpg.",
  )
  noted = [record.getMessage() for record in caplog.records]
  assert noted == [*source.left_out, *source.ignored]
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
    f"Pair 2 of {tmp_path}/x.tar cannot be used: its text is not UTF-8 text (byte 0).",
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
