"""tools/verify_parity.py: every kind of disagreement is found and named, and hides no other."""

import json

import numpy as np
import pytest

from mplug_jax.parity import beams, rows, verify, vqa
from tests.support import parity
from tools import verify_parity

SOURCE = parity.FOLDERS[0] / "caption_G5.npz"


@pytest.fixture(scope="module")
def arrays():
  """The smallest recording with two beam searches, the rewarded one and a short one."""
  kept = "beam/beam5_min8_max25/", "beam/beam1_min1_max8/"
  with np.load(SOURCE) as file:
    return {
      name: file[name]
      for name in file.files
      if not name.startswith("beam/") or name.startswith(kept)
    }


def altered(path, arrays, change=None, **meta):
  """Writes the arrays with a change to them and to fields of `meta`; the path."""
  arrays = {name: x.copy() for name, x in arrays.items()}
  if change:
    change(arrays)
  if "meta" in arrays:
    arrays["meta"] = np.array(json.dumps(json.loads(str(arrays["meta"])) | meta))
  np.savez(path, **arrays)
  return str(path)


def failed(report):
  return {row.name for row in report.failed}


def test_results_that_are_wrong(arrays, tmp_path, capsys):
  """Each wrong number fails its own row alone.

  A missing result is skipped, an unknown one is listed, a broken check is a row.
  """
  gradient = "grad/loss/text_decoder.bert.embeddings.word_embeddings.weight"
  norms = json.loads(str(arrays["meta"]))["grad_norms"]
  name = "text_decoder.bert.encoder.layer.0.intermediate.dense.weight"
  norms["loss"] |= {name: 1.01 * norms["loss"][name]}

  def change(x):
    x["out/image_embeds"][0, 0, 0] += 1e-3
    x[gradient] *= 1.001
    x["beam/beam5_min8_max25/ids"][1, 0, 3] += 1
    x["beam/beam1_min1_max8/scores"][1, 0] = np.nan
    del x["out/visual"], x["in/scst_reward"]
    x["out/novelty"] = np.zeros(2)

  path = altered(tmp_path / "wrong.npz", arrays, change, grad_norms=norms)
  assert verify_parity.main([path, f"--json={tmp_path}/rows.json"]) == 1
  [result] = json.loads((tmp_path / "rows.json").read_text())
  rows = {row["name"]: row for row in result["rows"]}
  wrong = {name for name, row in rows.items() if not row["passed"]}
  assert wrong == {
    "out/image_embeds",
    gradient,
    "grad_norms/loss/text_decoder",
    "beam/beam5_min8_max25/ids",
    "beam/beam1_min1_max8/scores",
    "SCST",
  }
  assert rows["grad_norms/loss/text_decoder"]["note"] == name
  assert rows["out/image_embeds"]["error"] == pytest.approx(1e-3, rel=0.05)
  assert rows["out/image_embeds"]["shape"] == list(arrays["out/image_embeds"].shape)
  assert result["skipped"]["out/visual"] == "not in the file"
  assert {"out/novelty", "out/scst_loss"} <= set(result["not_checked"])
  printed = capsys.readouterr().out
  assert "FAIL     SCST" in printed
  assert "the file has no array 'in/scst_reward'" in printed
  assert "6 failed" in printed.splitlines()[-1]


def test_a_weight_that_is_wrong(arrays, tmp_path):
  """Later results fail, earlier results pass."""

  def change(x):
    x["sd/text_decoder.cls.predictions.transform.dense.bias"][0] += 0.05

  prefixes = "sd/", "meta", "in/", "out/visual", "out/image", "out/decoder", "out/loss"
  keep = {name: x for name, x in arrays.items() if name.startswith(prefixes)}
  report = verify(altered(tmp_path / "weight.npz", keep, change))
  assert {"out/decoder_logits", "out/loss"} <= failed(report)
  assert {row.name for row in report.rows if row.passed} >= {"out/visual", "out/image_embeds"}


def test_weights_that_do_not_fit(arrays, tmp_path):
  def change(x):
    x["sd/visn_fc.gamma"] = np.zeros(3)

  [row] = verify(altered(tmp_path / "weight.npz", arrays, change)).rows
  assert row.name == "conversion of sd/"
  assert not row.passed
  assert "visn_fc.gamma" in row.note


def test_unusable_files(arrays, tmp_path, capsys):
  """One sentence each, status 2, and the next file is looked at."""

  def without(*prefixes):
    return {name: x for name, x in arrays.items() if not name.startswith(prefixes)}

  text, single, cut, damaged = (
    tmp_path / name for name in ("notes.npz", "single.npz", "cut.npz", "damaged.npz")
  )
  text.write_text("no archive")
  with open(single, "wb") as file:
    np.save(file, np.zeros(3))
  whole = SOURCE.read_bytes()
  cut.write_bytes(whole[: len(whole) // 2])
  middle = len(whole) // 2
  damaged.write_bytes(
    whole[:middle] + bytes(255 - b for b in whole[middle : middle + 64]) + whole[middle + 64 :]
  )
  cases = {
    str(tmp_path / "none.npz"): "does not exist",
    str(text): "cannot be read",
    str(single): "a single array",
    str(cut): "cannot be read",
    str(damaged): "damaged",
    str(tmp_path): "cannot be read",
    altered(tmp_path / "meta.npz", without("meta")): "no array 'meta'",
    altered(tmp_path / "sd.npz", without("sd/")): "holds no weights",
    altered(
      tmp_path / "task.npz", arrays, task="haiku"
    ): "unknown task 'haiku'; known are vqa, caption",
    altered(tmp_path / "geometry.npz", arrays, geometry={"image": 42}): "'meta' lacks patch",
  }
  assert verify_parity.main(list(cases)) == 2
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(cases)
  for line, (path, sentence) in zip(lines, cases.items()):
    assert line.startswith(path), line
    assert sentence in line, line
    assert line.endswith("."), line


def test_rows_that_cannot_be_written(tmp_path, capsys):
  assert verify_parity.main([f"{tmp_path}/none.npz", f"--json={tmp_path}/no/rows.json"]) == 2
  assert "The rows could not be written: " in capsys.readouterr().out.splitlines()[-1]


def test_the_task_is_told_by_arrays_when_meta_does_not(arrays, tmp_path):
  meta = {key: x for key, x in json.loads(str(arrays["meta"])).items() if key != "task"}
  np.savez(tmp_path / "vqa_named.npz", **(arrays | {"meta": np.array(json.dumps(meta))}))
  assert parity.Recording(tmp_path / "vqa_named.npz").task == "caption"


def test_compare():
  """Tolerances are absolute or of the largest value; a NaN never passes, equal infinities do."""
  tolerance = rows.Tolerance(1e-3, 1e-2)
  row = rows.compare("x", [[10.0, 0.0]], [[10.0, 0.09]], tolerance)
  assert row.passed
  assert row.shape == (1, 2)
  assert row.error == 0.09
  assert row.tolerance == 0.1
  assert row.relative == 0.009
  assert not rows.compare("x", [10.0, 0.0], [10.0, 0.11], tolerance).passed
  assert not rows.compare("x", [0.002], [0.0], tolerance).passed
  for ours, recorded in (
    ([np.nan], [1.0]),
    ([1.0], [np.nan]),
    ([np.nan], [np.nan]),
    ([np.inf], [1.0]),
    ([1.0], [1.0, 1.0]),
  ):
    assert not rows.compare("x", ours, recorded, tolerance).passed
  assert rows.compare("x", [-np.inf, 1.0], [-np.inf, 1.0], rows.EXACT).passed
  assert rows.compare("x", np.zeros((0, 3)), np.zeros((0, 3)), rows.EXACT).passed
  assert not rows.compare("x", [1.0, 2], [1.0, 3], rows.EXACT).passed


def test_near_ties_may_swap_and_nothing_else():
  """Hypotheses 1 and 2 have tied scores, hypothesis 0 has not."""
  ids, lengths = np.array([[[1, 2, 3], [1, 4, 5], [1, 6, -1]]]), np.array([[3, 3, 2]])
  scores = np.array([[-1.0, -2.0, -2.00001]])

  def swapped(*order):
    return beams._swapped(ids[:, list(order)], lengths[:, list(order)], ids, scores)

  for order in ((0, 1, 2), (0, 2, 1)):
    moved, moved_lengths = swapped(*order)
    np.testing.assert_array_equal(moved, ids)
    np.testing.assert_array_equal(moved_lengths, lengths)
  for order in ((1, 0, 2), (2, 1, 0), (0, 1, 1)):
    assert (swapped(*order)[0] != ids).any()


def test_updates_are_compared_where_the_gradient_has_a_direction():
  """One gradient of 2 is exact within its error of 1e-8, the other is smaller than that error."""

  class Recorded(dict):
    def pairs(self, tree, prefix):
      yield f"{prefix}w", tree, self[f"{prefix}w"]

  case = object.__new__(vqa._Case)
  case.r = Recorded({"grad/loss/w": np.array([2.0, 1e-9]), "opt/after3/w": np.array([1.0, 1.0])})
  case.online = None, None, np.array([2.0 + 1e-8, 1e-9])

  def passed(*values):
    return [row.passed for row in case._after(np.array(values), "opt/after3/", 3e-3)]

  assert passed(1.0, 1.00005) == [True]
  assert passed(1.0, 1.002) == [True, True]
  assert passed(1.0, 1.01) == [True, False]
  assert passed(1.002, 1.0) == [False, True]
