"""Text cleaning against strings recorded from the official functions."""

import json

import pytest

from mplug_jax.data.text import cleaning
from tests.support import paths

GOLDEN = paths.GOLDEN / "text_preproc.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("name", ["pre_question", "pre_caption"])
def test_equals_the_official_cleaning(name):
  function = getattr(cleaning, name)
  checked = 0
  for case in CASES:
    for max_words, expected in case[name].items():
      assert function(case["input"], int(max_words)) == expected, (case["input"], max_words)
      checked += 1
  assert checked >= 3 * len(CASES) >= 30


def test_vqa_text_joins_the_selected_parts():
  question = "What does the sign say?"
  args = (question, "STOP, All!", "sign&&pole&&tree&&sign")
  assert cleaning.vqa_text(*args) == question
  assert cleaning.vqa_text(*args, add_ocr=True, add_objects=True) == (
    "What does the sign say? [SEP] stop all [SEP] sign pole tree sign"
  )
  assert cleaning.vqa_text(*args, add_objects=True) == (
    "What does the sign say? [SEP] sign pole tree sign"
  )


def test_vqa_text_skips_empty_parts_and_caps_ocr_at_30_words():
  assert cleaning.vqa_text("Why?", "", "", add_ocr=True, add_objects=True) == "Why?"
  long = cleaning.vqa_text("Why?", " ".join(map(str, range(40))), add_ocr=True)
  assert long == "Why? [SEP] " + " ".join(map(str, range(30)))
