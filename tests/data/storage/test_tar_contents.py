"""What goes into a tar of pairs, or of images, is in the result, or is counted and named."""

import collections
import io
import itertools
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.data import errors
from mplug_jax.data.errors import ImageError
from mplug_jax.data.images.suffixes import IMAGE_SUFFIXES
from mplug_jax.data.storage import archives, shards, tar_headers
from tests.support import tiny_run
from tests.support.shard_files import caption, numbered, pair, picture, tar_bytes
from tests.support.shards_case import content, expected
from tools import prepare_data

pytestmark = pytest.mark.usefixtures("index_cache")


def load(path, data):
  """Writes a tar and reads its pairs."""
  path.write_bytes(data)
  return shards.load([str(path)])


def strict(path):
  return lambda: shards.load([str(path)], strict=True)


# ---- joined archives


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("zeros", [0, 512, 3 << 20])
def test_joined_tars_are_read_to_the_end(tmp_path, form, zeros):
  path = tmp_path / "x.tar"
  first, second = (tar_bytes(numbered(range(*part)), form) for part in ((0, 3), (3, 7)))
  source = load(path, first + bytes(zeros) + second + bytes(zeros))
  assert content(source) == expected(7)
  assert source.left_out == source.ignored == ()
  assert content(shards.load([str(path)], strict=True)) == expected(7)
  assert archives.open_bytes(f"{path}/00005.jpg") == picture(5)
  with open(path, "rb") as file:
    members = list(tar_headers.members(file, path.stat().st_size))
  assert [member.name for member in members][-1] == b"00006.txt"


def test_joined_tars_of_the_same_keys_cannot_be_told_apart(tmp_path):
  path = tmp_path / "x.tar"
  for first in (range(3), range(2, 3)):  # the key at the boundary is apart, or adjacent
    source = load(path, tar_bytes(numbered(first)) + tar_bytes({"00002": pair(7)}))
    assert content(source)[-2:] == [
      (picture(2), caption(2).lower()),
      (picture(7), caption(7).lower()),
    ]
    assert source.left_out == (
      f"Pairs that repeat a key, and so cannot be told apart: 1, the first {path}/00002.",
    )
    tiny_run.refused(strict(path), "Pairs that repeat a key", "config.data.strict=True")


def test_what_follows_a_tar_and_is_none_is_named(tmp_path, caplog):
  path = tmp_path / "x.tar"
  whole = tar_bytes(numbered(range(2)))
  for rest in (b"garbage", b"\x1f\x8b" + b"x" * 3000, b"x" + tar_bytes(numbered(range(2, 4)))):
    source = load(path, whole + rest)
    assert content(source) == expected(2)
    assert source.left_out == (
      f"{path} has {len(rest)} bytes after its end, from byte {len(whole)} on, that are no tar; "
      "its last good member is 00001.txt.",
    ) or (len(rest) < 512 and f"{path} is cut off at byte {len(whole)}; " in source.left_out[0])
    tiny_run.refused(strict(path), str(path))
  caplog.clear()
  assert archives.open_bytes(f"{path}/00001.jpg") == picture(1)
  assert "the files behind that are not found." in caplog.text


def test_a_conversion_takes_both_tars_and_prints_what_it_leaves_out(tmp_path, capsys):
  path = tmp_path / "x.tar"
  path.write_bytes(tar_bytes(numbered(range(2))) + tar_bytes([*_members(2), ("._2.jpg", b"x")]))
  out = tmp_path / "records"
  assert prepare_data.main(["shards", str(path), f"--out={out}", "--workers=1", "--verify"]) == 0
  printed = capsys.readouterr().out
  assert "3 pairs in 1 files" in printed
  assert f"Members that belong to no pair: 1 ignored, the first {path}/._2.jpg." in printed
  assert content(shards.load([f"{out}/*.array_record"])) == expected(3)


def _members(number):
  return [(f"{number:05d}.{end}", data) for end, data in pair(number).items()]


def test_joined_zips_and_repeated_names_are_named(tmp_path, caplog):
  def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
      for name in names:
        archive.writestr(name, name)
    return file.getvalue()

  path = tmp_path / "x.zip"
  first = zipped("a")
  path.write_bytes(first + zipped("b"))
  assert archives.open_bytes(f"{path}/b") == b"b"
  assert f"{path} has another zip file in its first {len(first)} bytes" in caplog.text
  caplog.clear()
  (tmp_path / "x.tar").write_bytes(tar_bytes([("a", b"1"), ("./a", b"2"), ("b", b"3")]))
  assert archives.open_bytes(f"{tmp_path}/x.tar/a") == b"2"
  assert f"{tmp_path}/x.tar: 1 files have the name of a later one, which counts" in caplog.text
  caplog.clear()
  path.write_bytes(zipped("a", "b"))
  assert archives.open_bytes(f"{path}/a") == b"a"
  assert caplog.text == ""


# ---- texts of pairs


def test_texts_are_decoded_as_everywhere(tmp_path):
  members = {
    "bom": pair(0, txt="\ufeffA café".encode(), json=None),
    "json": pair(1, txt=None, json='\ufeff{"caption": "A café"}'.encode()),
    "both": pair(2, txt="\ufeffé".encode(), json=b'{"caption": "other"}'),
    "inside": pair(3, txt="a \ufeffb".encode(), json=None),
    "utf16": pair(4, txt="A dog".encode("utf-16"), json=None),
    "latin": pair(5, txt=None, json=b'{"caption": "caf\xe9"}'),
    "lone": pair(6, txt=None, json=b'{"caption": "cut \\ud83d"}'),
    "twice": pair(7, txt=None, json=b'{"caption": "a", "caption": "b"}'),
    "elsewhere": pair(8, txt=None, json=b'{"caption": "A dog", "exif": "\\ud83d", "x": 1, "x": 2}'),
    "empty": pair(9, txt="\ufeff \n".encode(), json=None),
  }
  source = load(tmp_path / "x.tar", tar_bytes(members))
  results = [source[i] for i in range(len(members))]
  texts = {
    name: record["captions"][0]
    for name, record in zip(members, results)
    if not isinstance(record["image"], ImageError)
  }
  assert texts == {
    "bom": "a café",
    "json": "a café",
    "both": "é",
    "inside": "a \ufeffb",
    "elsewhere": "a dog",
  }
  problems = {
    name: str(record["image"])
    for name, record in zip(members, results)
    if isinstance(record["image"], ImageError)
  }
  for name, message in {
    "utf16": "its text is UTF-16 or UTF-32 text; save it as UTF-8.",
    "latin": "its text is not UTF-8 text (byte 16).",
    "lone": "its caption is no valid Unicode (the lone surrogate \\ud83d).",
    "twice": "it has more than one caption.",
    "empty": "its caption is empty.",
  }.items():
    assert problems[name] == f"Pair {name} of {tmp_path}/x.tar cannot be used: {message}"


def test_records_with_wrong_texts(tmp_path):
  import msgpack
  from array_record.python import array_record_module

  good = {"key": "a", "image": picture(0), "caption": "\ufeffA dog"}
  packed = msgpack.packb(good)
  rows = [
    packed,
    packed.replace("\ufeffA dog".encode(), b"\xff\xfeA dog\xff"),
    b"\x84" + packed[1:] + msgpack.packb("caption") + msgpack.packb("A cat"),
  ]
  writer = array_record_module.ArrayRecordWriter(f"{tmp_path}/x.array_record", "group_size:1")
  for row in rows:
    writer.write(row)
  writer.close()
  source = shards.load([f"{tmp_path}/x.array_record"])
  assert content(source) == [(picture(0), "a dog"), (None, ""), (None, "")]
  assert "cannot be read: a text is not UTF-8." in str(source[1]["image"])
  assert "cannot be read: no map with image, caption and key." in str(source[2]["image"])


# ---- members


def test_every_suffix_of_images_makes_pairs(tmp_path):
  names = [*IMAGE_SUFFIXES, ".JPG", ".JFIF"]
  members = [
    (f"{i}{suffix}", data)
    for i, name in enumerate(names)
    for suffix, data in ((name, picture(i)), (".TXT", caption(i).encode()))
  ]
  source = load(tmp_path / "x.tar", tar_bytes(members))
  assert content(source) == expected(len(names))
  assert source.left_out == source.ignored == ()


def test_members_that_are_not_used_are_named(tmp_path):
  path = tmp_path / "x.tar"
  members = [
    ("0.jpg", picture(0)),
    ("0.png", picture(1, "PNG")),
    ("0.txt", b"two formats"),
    ("a.v2.jpg", picture(2)),
    ("a.v2.txt", b"a dot in the key"),
    ("1.jpg", picture(3)),
    ("1.jpg", picture(4)),
    ("1.txt", b"two images"),
    ("2.jpg", picture(5)),
    ("2.txt", b"one text"),
    ("2.txt", b"another"),
    ("._3.jpg", b"x"),
    ("README", b"x"),
    ("2.cls", b"1"),
  ]
  source = load(path, tar_bytes(members))
  assert content(source) == [
    (picture(0), "two formats"),
    (picture(4), "two images"),
    (picture(5), "one text"),
  ]
  assert source.left_out == (
    f"Keys without an image: 1 left out, the first {path}/2.",
    f"Keys without a text: 1 left out, the first {path}/1.",
    f"Images whose name has a dot in its key: 1 left out, the first {path}/a.v2.jpg.",
    f"Keys with more than one image, of which the first counts: 1, the first {path}/0.",
  )
  assert source.ignored == (
    f"Members that belong to no pair: 4 ignored, the first {path}/a.v2.txt.",
  )
  tiny_run.refused(strict(path), "Keys without an image: 1 left out")


def test_hard_links_are_counted(tmp_path):
  path = tmp_path / "x.tar"
  file = io.BytesIO(tar_bytes(numbered(range(1))))
  with tarfile.open(fileobj=file, mode="a") as tar:
    for name in ("1.jpg", "1.txt"):
      member = tarfile.TarInfo(name)
      member.type, member.linkname = tarfile.LNKTYPE, f"00000{name[1:]}"
      tar.addfile(member)
  source = load(path, file.getvalue())
  assert content(source) == expected(1)
  assert source.ignored == (f"Members that belong to no pair: 2 ignored, the first {path}/1.jpg.",)


# ---- property

NAMES = st.builds(
  "{}{}".format,
  st.sampled_from(["a", "b", "f/a", "._a", "a.b"]),
  st.sampled_from([".jpg", ".PNG", ".txt", ".json", ".cls", ""]),
)
MEMBERS = st.lists(
  st.tuples(NAMES, st.sampled_from([b"", b"x", b'{"caption": "x"}', b"\xef\xbb\xbfy", b"\xff"])),
  max_size=8,
)


def numbered_images(tars):
  """Gives every image that is not empty its own bytes, and every tar a list of members."""
  count = itertools.count()
  return [
    [
      (name, b"%d" % next(count) if data and name.endswith((".jpg", ".PNG")) else data)
      for name, data in tar
    ]
    for tar in tars
  ]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(tars=st.lists(MEMBERS, min_size=1, max_size=3).map(numbered_images), zeros=st.integers(0, 3))
def test_every_member_is_in_a_pair_or_counted(tmp_path_factory, tars, zeros):
  path = tmp_path_factory.mktemp("tars") / "x.tar"
  data = bytes(512 * zeros).join(map(tar_bytes, tars))
  members = [(name, data) for tar in tars for name, data in tar]
  refusal = ""
  source = None
  with errors.noted() as notes:
    try:
      source = load(path, data)
    except ValueError as error:
      refusal = str(error)
  if source is None:
    assert "there is no pair" in refusal
    assert bool(members) == ("left out" in refusal or "ignored" in refusal)
    return
  assert notes == [*source.left_out, *source.ignored]
  counts = collections.Counter(source.parts[0]._index.skipped)
  pairs = [source[i] for i in range(len(source))]
  read = [record["image"] for record in pairs if not isinstance(record["image"], ImageError)]
  unusable = len(pairs) - len(read)  # with a text that is not UTF-8
  given_images = [data for name, data in members if data and name.endswith((".jpg", ".PNG"))]
  assert len(set(read)) == len(read)
  assert set(read) <= set(given_images)
  # A key has at most one image of each of the two formats.
  others = counts["unpaired image"] + counts["ignored"] + counts["several images"]
  assert len(given_images) - len(read) <= unusable + others + 2 * counts["no text"]
  given_texts = [name for name, data in members if data and name.endswith((".txt", ".json"))]
  assert len(given_texts) <= 2 * len(pairs) + 2 * counts["no image"] + counts["ignored"]
  assert len([name for name, data in members if not data]) <= counts["ignored"]
  keys = [record["image_id"] for record in pairs]
  assert len(keys) - len(set(keys)) == counts["repeated"]
  if source.left_out:
    tiny_run.refused(strict(path), "config.data.strict=True")
