"""Annotations as bytes (mplug_jax/data/storage/packed.py), and a source of many of them."""

import json
import pickle
import runpy
import tracemalloc

import pytest

from mplug_jax import data
from mplug_jax.data.storage import packed
from tests.support import tiny_run

VALUES = [None, True, 3, 2**70, -1.5, "", "naïve ☃", ["a", ["b"]], (1.0, 2.0), {"key": [1, None]}]


@pytest.mark.parametrize("times", [0, 1, 5])  # more than a block, and not a whole number of them
def test_values_come_back_as_they_were(times):
  values, given = packed.Packed(), VALUES * times
  for value in given:
    values.append(value)
  assert list(values) == given
  assert list(map(type, values)) == list(map(type, given))
  assert list(pickle.loads(pickle.dumps(values))) == given
  assert len(values) == len(given)
  for index in (-1, len(given)):
    with pytest.raises(IndexError):
      values[index]


def test_dictionaries_keep_their_keys_alone():
  rows = packed.Packed(("a", "b"))
  rows.append({"b": 2, "a": 1, "c": 3})
  assert rows[0] == {"a": 1, "b": 2}
  with pytest.raises(KeyError):
    rows.append({"a": 1})
  assert len(rows) == 1


@pytest.mark.parametrize(
  "owners",
  [(), (0, 0, 1, 2, 2), (2, 0, 2, 1, 0), (2, 2)],
  ids=["none", "in order", "mixed", "not all"],
)
def test_items_are_found_with_their_record(owners):
  records = packed.Grouped(("name", "size"), "items")
  assert [records.add({"name": f"r{i}", "size": i}, f"r{i}") for i in range(3)] == [0, 1, 2]
  assert records.find("r1") == 1
  assert records.find("r3") is None
  for place, owner in enumerate(owners):
    records.add_item(owner, f"item {place}")
  records = pickle.loads(pickle.dumps(records.close()))
  expected = [
    [f"item {place}" for place, owner in enumerate(owners) if owner == number]
    for number in range(3)
  ]
  assert list(records) == [
    {"name": f"r{i}", "size": i, "items": items} for i, items in enumerate(expected)
  ]
  assert records.counts().tolist() == list(map(len, expected))
  with pytest.raises(IndexError):
    records[3]


def test_many_records_take_little_more_memory_than_their_file(tmp_path):
  (tmp_path / "a.png").write_bytes(b"")
  path = tmp_path / "train.jsonl"
  with path.open("w") as file:
    for number in range(20_000):
      row = {
        "question_id": number,
        "image": "a.png",
        "question": f"what is number {number} of all these things?",
        "answer": "a thing",
      }
      file.write(json.dumps(row) + "\n")
  config = runpy.run_path(str(tiny_run.ROOT / "configs" / "vqa.py"))["get_config"](
    f"tiny,data=jsonl:{path}"
  )
  data.get_source(config, "train")  # imports what it needs
  tracemalloc.start()
  source = data.get_source(config, "train")
  kept, _ = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert source[19_999]["questions"][0]["question"] == "what is number 19999 of all these things?"
  assert kept < 2 * path.stat().st_size  # as objects they take eight times as much
