"""tools.score_captions: files of results and annotations, by domain."""

import json
import logging

import pytest

from mplug_jax.metrics import captioning
from tools import score_captions

ANNOTATIONS = {
  "images": [
    {"id": 1, "domain": "in-domain"},
    {"id": 2, "domain": "out-domain"},
    {"id": 3, "domain": "out-domain"},
    {"id": 4},
  ],
  "annotations": [
    {"image_id": 1, "caption": "A dog runs."},
    {"image_id": 1, "caption": "The dog is running"},
    {"image_id": 2, "caption": "Two cats on a mat"},
    {"image_id": 3, "caption": "a red bus"},
    {"image_id": 4, "caption": "a plate of food"},
  ],
}
RESULTS = [
  {"image_id": 3, "caption": "a red bus"},
  {"image_id": 1, "caption": "a dog is running"},
  {"image_id": 2, "caption": "cats on the mat"},
  {"image_id": 4, "caption": "Food!"},
]


def test_each_domain_is_evaluated_separately():
  scores = captioning.score_domains(RESULTS, ANNOTATIONS)
  assert list(scores) == ["overall", "in-domain", "out-domain"]
  assert scores["overall"] == captioning.score(RESULTS, ANNOTATIONS)
  assert scores["out-domain"] == captioning.evaluate(
    {2: ["cats on the mat"], 3: ["a red bus"]}, {2: ["Two cats on a mat"], 3: ["a red bus"]}
  )


def run(tmp_path, results, annotations=ANNOTATIONS, *options):
  paths = [tmp_path / "results.json", tmp_path / "annotations.json"]
  for path, content in zip(paths, (results, annotations)):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
  return score_captions.main([*map(str, paths), *options])


def test_score_captions_prints_a_table_and_writes_the_scores(tmp_path, capsys):
  out = tmp_path / "scores.json"
  assert (
    run(tmp_path, RESULTS, ANNOTATIONS, "--metrics", "BLEU-1", "CIDEr-D", "--json", str(out)) == 0
  )
  scores = json.loads(out.read_text())
  assert scores == captioning.score_domains(RESULTS, ANNOTATIONS, ["BLEU-1", "CIDEr-D"])
  head, *lines = capsys.readouterr().out.splitlines()
  before = out.read_bytes()
  assert run(tmp_path, RESULTS, ANNOTATIONS, "--json", str(out)) == 2
  assert "scores.json exists" in capsys.readouterr().err
  assert out.read_bytes() == before
  assert run(tmp_path, RESULTS, ANNOTATIONS, "--json", str(out), "--overwrite") == 0
  assert out.read_bytes() != before
  assert head.split() == ["overall", "in-domain", "out-domain"]
  assert [line.split() for line in lines] == [
    [name, *(f"{scores[domain][name]:.2f}" for domain in scores)] for name in ("BLEU-1", "CIDEr-D")
  ]
  assert len({len(line) for line in (head, *lines)}) == 1


def test_score_captions_names_empty_references_and_domains_of_one_image(tmp_path, capsys, caplog):
  more = {"image_id": ANNOTATIONS["images"][0]["id"], "caption": " . "}
  annotations = {**ANNOTATIONS, "annotations": [*ANNOTATIONS["annotations"], more]}
  with caplog.at_level(logging.WARNING):
    assert run(tmp_path, RESULTS, annotations) == 0
  messages = [record.getMessage() for record in caplog.records]
  assert any(message.startswith("annotations: 1 of ") for message in messages)
  assert any(message.startswith("in-domain: CIDEr says nothing here") for message in messages)
  printed = capsys.readouterr().out
  assert run(tmp_path, RESULTS, ANNOTATIONS) == 0
  assert capsys.readouterr().out == printed
  empty = [entry | {"caption": ""} for entry in ANNOTATIONS["annotations"]]
  assert run(tmp_path, RESULTS, {**ANNOTATIONS, "annotations": empty}) == 2
  assert "annotations: no caption with a word for 4 images" in capsys.readouterr().err


def test_score_captions_partial(tmp_path, capsys):
  assert run(tmp_path, RESULTS[:2], ANNOTATIONS, "--partial") == 0
  assert "ROUGE-L" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("results", "annotations", "words"),
  [
    (
      RESULTS[:2],
      ANNOTATIONS,
      "results: no caption (evaluate those present with --partial) for 2 images: 2, 4.",
    ),
    ([*RESULTS, RESULTS[0]], ANNOTATIONS, "results: more than one caption for 1 image: 3."),
    (
      [*RESULTS, *({"image_id": 100 + i, "caption": ""} for i in range(6))],
      ANNOTATIONS,
      "results: not in the annotations for 6 images: 100, 101, 102, 103, 104, ....",
    ),
    (
      RESULTS,
      {**ANNOTATIONS, "annotations": ANNOTATIONS["annotations"][1:-1]},
      "annotations: no caption for 1 image: 4.",
    ),
    ([{"image_id": 1}], ANNOTATIONS, "results: entry 0 is {'image_id': 1}"),
    ({"a": 1}, ANNOTATIONS, "results: not a list"),
    (RESULTS, RESULTS, "annotations: not of the form"),
    (
      RESULTS,
      {"images": [{"name": 1}], "annotations": []},
      'annotations: an image without a number or text as "id"',
    ),
    ("[", ANNOTATIONS, "results.json: not a JSON file"),
    ([], {"images": [], "annotations": []}, "no captions to evaluate"),
  ],
)
def test_mismatched_files_give_one_error_line_and_status_2(
  tmp_path, capsys, results, annotations, words
):
  assert run(tmp_path, results, annotations) == 2
  message = capsys.readouterr()
  assert words in message.err
  assert message.err.count("\n") == 1
  assert not message.out


def test_unwritable_scores_give_status_2(tmp_path, capsys):
  assert run(tmp_path, RESULTS, ANNOTATIONS, "--json", str(tmp_path / "none" / "scores.json")) == 2
  assert "could not be written" in capsys.readouterr().err
