"""tools.prepare_data on RefCOCO, RefCOCO+ and RefCOCOg, from the REFER tool's files to a run."""

import json
import pickle

import pytest

from tests.support.downloads import (
  configs,
  picture,
  prepare,
  read,
  records,
  refused,
  run,
  write,
  write_zip,
)

pytestmark = pytest.mark.usefixtures("one_device")

SPLITS = ("train", "train", "val", "testA", "testB")


def refs(splits=SPLITS):
  """As the REFER tool has them; a name in an entry is that of the image and the annotation."""
  return [
    {
      "sent_ids": [2 * n, 2 * n + 1],
      "file_name": f"COCO_train2014_{n + 7:012d}_{100 + n}.jpg",
      "ann_id": 100 + n,
      "ref_id": n,
      "image_id": n + 7,
      "split": split,
      "category_id": 1,
      "sentences": [
        {"tokens": ["a", "cat"], "raw": "A cat", "sent_id": 2 * n, "sent": "a cat"},
        {"tokens": [], "raw": "", "sent_id": 2 * n + 1, "sent": "café on the left"},
      ],
    }
    for n, split in enumerate(splits)
  ]


def instances():
  return {
    "info": {},
    "licenses": [],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [
      {
        "segmentation": [[1.5, 2.5]],
        "area": 3.5,
        "iscrowd": 0,
        "image_id": n + 7,
        "bbox": [1.25, 2, 10, 12.5],
        "category_id": 1,
        "id": 100 + n,
      }
      for n in range(9)
    ],
    "images": [
      {
        "license": 1,
        "file_name": f"COCO_train2014_{n + 7:012d}.jpg",
        "height": 24,
        "width": 32,
        "id": n + 7,
      }
      for n in range(9)
    ],
  }


def images(prefix="train2014/"):
  return {f"{prefix}COCO_train2014_{n + 7:012d}.jpg": picture(n) for n in range(5)}


@pytest.fixture
def folder(tmp_path):
  """Unpacked, as most have it."""
  write(
    tmp_path,
    {
      "refcoco/refs(unc).p": pickle.dumps(refs(), 0),
      "refcoco/instances.json": instances(),
      **images(),
    },
  )
  return tmp_path


@pytest.mark.slow
def test_a_run_on_refcoco(folder, tmp_path_factory):
  printed = prepare("refcoco", folder)
  where = folder / "refcoco"
  command = f"--config=configs/grounding.py:base,data=refcoco,root={where}"
  assert printed == [
    f"wrote {where}/testA.json: 1 objects",
    f"wrote {where}/testB.json: 1 objects",
    f"wrote {where}/train.json: 2 objects",
    f"wrote {where}/val.json: 1 objects",
    "note: 10 expressions altogether, in the splits of unc",
    f"train: python -m mplug_jax.main {command} --config.tokenizer.path=vocab.txt",
    *(
      f"evaluate: python -m mplug_jax.main --mode=evaluate --checkpoint=RUN "
      f"{command},test={split} --config.eval.split=test "
      "--config.tokenizer.path=vocab.txt"
      for split in ("testA", "testB")
    ),
  ]
  assert read(where / "train.json")[0] == {
    "image": f"{folder}/train2014/COCO_train2014_000000000007.jpg",
    "bbox": [1.25, 2, 10, 12.5],
    "sentences": ["a cat", "café on the left"],
    "ref_id": 0,
  }
  config, *tests = configs(printed, compilation_cache="", total_steps=2)
  train, val = records(config, "train", "val")
  assert len(train) == 4
  assert len(val) == 2
  assert train[1]["expressions"] == [
    {"id": "0-1", "text": "café on the left", "box": (1.25, 2.0, 11.25, 14.5)}
  ]
  for c, number in zip(tests, (3, 4)):
    assert c.eval.split == "test"
    assert records(c, "test")[0][0]["image"].endswith(f"{number + 7}.jpg")
  workdir = tmp_path_factory.mktemp("run")
  assert run(config, workdir).startswith("final: acc@0.5 ")
  assert len(json.loads((workdir / "predictions.json").read_text())) == 2


def test_all_three_in_one_folder_and_zipped(tmp_path):
  for name, split_by, splits in (
    ("refcoco+", "unc", SPLITS),
    ("refcocog", "umd", ("train", "val", "test")),
  ):
    write_zip(
      tmp_path / f"{name}.zip",
      {
        f"{name}/refs({split_by}).p": pickle.dumps(refs(splits), 2),
        f"{name}/instances.json": instances(),
      },
    )
  write_zip(tmp_path / "train2014.zip", images())
  for name, splits in (("refcoco+", ("testA", "testB")), ("refcocog", ("test",))):
    config, *tests = configs(prepare(name, tmp_path))
    assert config.data.train_files == (f"{tmp_path}/{name}/train.json",)
    assert len(tests) == len(splits)
    assert [len(found) for found in records(config, "train", "val")] == [
      4 if name == "refcoco+" else 2,
      2,
    ]
    assert [c.data.test_file for c in tests] == [
      f"{tmp_path}/{name}/{split}.json" for split in splits
    ]
  refused(
    "refcoco+",
    tmp_path,
    "lacks refs(google).p or refcoco+/refs(google).p or",
    "refcoco+.zip/refcoco+/refs(google).p",
    options=["--split_by=google"],
  )


def test_texts_of_python_2(folder):
  """Its byte strings in protocol 0; b'caf\\xc3\\xa9' is UTF-8."""
  data = pickle.dumps(refs(), 0).replace(b"Vcaf\xe9 on the left", b"S'caf\\xc3\\xa9 on the left'")
  assert data != pickle.dumps(refs(), 0)
  write(folder, {"refcoco/refs(unc).p": data})
  prepare("refcoco", folder)
  assert {text for row in read(folder / "refcoco/train.json") for text in row["sentences"]} == {
    "a cat",
    "café on the left",
  }


class Hostile:
  def __reduce__(self):
    return print, ("this runs",)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (
      pickle.dumps(refs() + [Hostile()]),
      "refs(unc).p names builtins.print, but a list of refs consists of plain values",
    ),
    (pickle.dumps(refs())[:-9], "its pickle cannot be read ("),
    (b"<html>", "the file is damaged or not a list of refs."),
    (
      pickle.dumps({"a": 1}),
      "refs(unc).p must hold a list of objects, not a dictionary with 'a': int.",
    ),
    (
      pickle.dumps([3]),
      "refs(unc).p, entry 1: must be an object with ref_id, ann_id, image_id, split, sentences, "
      "not a int.",
    ),
    (
      pickle.dumps(refs(("train", "dev"))),
      "entry 2: split 'dev' is not one of train, val, testA, testB, test.",
    ),
    (
      pickle.dumps(refs(("train", "testA"))),
      "refs(unc).p: no entry is of split 'val'; they are of testA, train;",
    ),
    (
      pickle.dumps([refs()[0] | {"sentences": [{"raw": "x"}]}]),
      "entry 1, sentences: key 'sent' is missing.",
    ),
    (pickle.dumps(refs() + [refs()[0] | {"ann_id": 5}]), "entry 6: no annotation of"),
    (
      pickle.dumps(refs() + [refs()[0] | {"image_id": 9}]),
      "entry 6: image_id 9 is not that of its annotation, 7,",
    ),
    (
      pickle.dumps(refs() + [refs()[0] | {"ann_id": 108, "image_id": 15}]),
      "1 of the train2014 images of COCO are missing, for instance COCO_train2014_000000000015.jpg",
    ),
  ],
)
def test_refusals(folder, capsys, data, message):
  write(folder, {"refcoco/refs(unc).p": data})
  refused("refcoco", folder, message)
  assert "this runs" not in capsys.readouterr().out


def test_boxes_are_checked(folder):
  content = instances()
  content["annotations"][0]["bbox"] = [1, 2, 0, 5]
  write(folder, {"refcoco/instances.json": content})
  refused(
    "refcoco", folder, "instances.json, annotations, entry 1: the box [1.0, 2.0, 0.0, 5.0] is empty"
  )
