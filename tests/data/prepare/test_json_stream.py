"""Large JSON files read entry by entry equal json.load, wherever the chunks end."""

import gzip
import json
import zipfile

import pytest

from mplug_jax.data.prepare import json_stream
from tests.support.tiny_run import refused

ROWS = [
  {"id": 1, "text": 'a "b" \\ é \U0001f600', "more": [1.5e3, {"x": [None, True, "]}"]}]},
  {"id": 22, "text": ""},
  {"id": 333, "text": "]"},
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize(("indent", "ascii"), [(None, False), (2, True)])
def test_the_same_in_pieces_of_any_size(tmp_path, monkeypatch, chunk, indent, ascii):
  monkeypatch.setattr(json_stream, "_CHUNK", chunk)
  path = tmp_path / "a.json"
  path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=ascii), "utf-8")
  types = {"id": int, "text": str}
  assert [row for row, _ in json_stream.entries(path, types)] == ROWS
  path.write_text(
    json.dumps(
      {"n": 12345, "skipped": [[1], 2, []], "rows": ROWS, "last": {"a": "b"}}, indent=indent
    ),
    "utf-8-sig",
  )
  others = {}
  assert list(json_stream.entries(path, types, "rows", others)) == [
    (row, f"{path}, rows, entry {n}") for n, row in enumerate(ROWS, 1)
  ]
  assert others == {"n": 12345, "last": {"a": "b"}}
  path.write_text(json.dumps({str(row["id"]): row for row in ROWS}, indent=indent))
  assert [(name, row) for name, row, _ in json_stream.members(path, types)] == [
    (str(row["id"]), row) for row in ROWS
  ]
  path.write_text(" [ ]\n")
  assert list(json_stream.entries(path, types)) == []


def test_packed(tmp_path):
  path = tmp_path / "a.json.gz"
  path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
  with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
    file.writestr("b/c.json", json.dumps(ROWS))
    file.writestr("b/d.json.gz", path.read_bytes())
  for name in (path, tmp_path / "a.zip" / "b/c.json", tmp_path / "a.zip" / "b/d.json.gz"):
    assert [row for row, _ in json_stream.entries(name, {"id": int})] == ROWS
  path.write_bytes(path.read_bytes()[:-9])
  refused(lambda: list(json_stream.entries(path, {})), f"{path} is not a complete gzip file")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('[{"id": 1}, {"id": "2"}]', "entry 2: id must be a whole number."),
    ('[{"id": true}]', "entry 1: id must be a whole number."),
    ('[{"id": 1} {"id": 2}]', "character 12: not valid JSON (, or ] should be here)"),
    ('[{"id": 1},', "not valid JSON ("),
    ("", "character 1: not valid JSON (the file is cut off)"),
    ("[" * 100_000, "nested too deeply"),
    ("[1]", "entry 1: must be an object"),
  ],
)
def test_what_is_wrong_is_said(tmp_path, text, message):
  path = tmp_path / "a.json"
  path.write_text(text)
  refused(lambda: list(json_stream.entries(path, {"id": int})), str(path), message)
