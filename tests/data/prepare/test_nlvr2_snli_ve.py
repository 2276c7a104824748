"""tools.prepare_data on NLVR2, SNLI-VE and clips, from the distributed files to a run."""

import tarfile

import pytest

from mplug_jax.data.images import video
from mplug_jax.data.sources import vqa
from tests.support import word_list
from tests.support.downloads import (
  configs,
  lines,
  picture,
  prepare,
  read,
  records,
  refused,
  run,
  write,
  write_clips,
  write_zip,
)

pytestmark = pytest.mark.usefixtures("one_device")

WORDS = ["the", "left", "image", "shows", "a", "red", "green", "cat", "dog"]


# ---- statements


def nlvr2(name, count=2):
  return [
    {
      "sentence": f"The left image shows a {'red' if n else 'green'} cat.",
      "left_url": "http://x",
      "right_url": "http://y",
      "identifier": f"{name}-10{n}-0-1",
      "label": "True" if n else "False",
      "validation": {},
      "writer": "1",
      "synset": "cat",
      "query": "cat0",
      **({"directory": 12} if name == "train" else {}),
    }
    for n in range(count)
  ]


def nlvr2_images(name, folder, count=2):
  return {
    f"{folder}{name}-10{n}-0-img{side}.png": picture(n + side)
    for n in range(count)
    for side in (0, 1)
  }


@pytest.fixture
def folder(tmp_path):
  """NLVR2 as distributed, dev images in their zip; vocab.txt."""
  write(tmp_path, {f"data/{name}.json": lines(nlvr2(name)) for name in ("train", "dev", "test1")})
  write(tmp_path, nlvr2_images("train", "images/train/12/"))
  write_zip(tmp_path / "dev_img.zip", nlvr2_images("dev", "dev/"))
  write(
    tmp_path,
    nlvr2_images("test1", "test1/") | {"vocab.txt": word_list.text(*WORDS)},
  )
  return tmp_path


def test_nlvr2(folder):
  printed = prepare("nlvr2", folder)
  assert printed == [
    *(f"wrote {folder}/nlvr_{split}.json: 2 statements" for split in ("train", "dev", "test")),
    f"train: python -m mplug_jax.main --config=configs/nlvr2.py:base,data=nlvr2,root={folder} "
    "--config.tokenizer.path=vocab.txt",
  ]
  assert read(folder / "nlvr_train.json")[1] == {
    "id": "train-101-0-1",
    "sentence": "The left image shows a red cat.",
    "label": "True",
    "images": [f"images/train/12/train-101-0-img{side}.png" for side in (0, 1)],
  }
  train, val, test = records(*configs(printed), "train", "val", "test")
  assert [
    image.removeprefix(f"{folder}/")
    for image in train[0]["images"] + val[0]["images"] + test[0]["images"]
  ] == [
    *(f"images/train/12/train-100-0-img{side}.png" for side in (0, 1)),
    *(f"dev_img.zip/dev/dev-100-0-img{side}.png" for side in (0, 1)),
    *(f"test1/test1-100-0-img{side}.png" for side in (0, 1)),
  ]


@pytest.mark.slow
def test_a_run_on_nlvr2(folder):
  (c,) = configs(
    prepare("nlvr2", folder),
    tokenizer__kind="wordpiece",
    tokenizer__path=str(folder / "vocab.txt"),
    compilation_cache="",
    total_steps=2,
    data__max_text=10,
  )
  assert run(c, folder / "run").startswith("final: accuracy ")


def test_nlvr2_with_training_images_in_one_folder(folder):
  for path in (folder / "images/train/12").iterdir():
    path.rename(folder / "images/train" / path.name)
  (train,) = records(*configs(prepare("nlvr2", folder)), "train")
  assert train[0]["images"][1] == f"{folder}/images/train/train-100-0-img1.png"


def test_nlvr2_is_checked(tmp_path):
  write(tmp_path, {f"{name}.json": lines(nlvr2(name)) for name in ("train", "dev")})
  refused(
    "nlvr2",
    tmp_path,
    "lacks test1.json or data/test1.json or nlvr2/data/test1.json (NLVR2's test1 split).",
  )
  write(tmp_path, {"test1.json": lines(nlvr2("test1"))})
  refused(
    "nlvr2",
    tmp_path,
    "12/train-100-0-img0.png is not in images/train or train or",
    "(the train images of NLVR2)",
  )
  for rows, message in (
    (nlvr2("dev"), "train.json, line 1: identifier 'dev-100-0-1' is not of the form train-1-2-3."),
    (
      [nlvr2("train")[0] | {"label": "yes"}],
      "train.json, line 1: label 'yes' must be True or False.",
    ),
    ([{"sentence": "x"}], "train.json, line 1: key 'identifier' is missing."),
  ):
    write(tmp_path, {"train.json": lines(rows)})
    refused("nlvr2", tmp_path, message)
  write(tmp_path, {"train.json": lines(nlvr2("train")) + "{"})
  write(tmp_path, nlvr2_images("train", "train/12/"))
  refused("nlvr2", tmp_path, "train.json, line 3, column 2: not valid JSON")


def snli(split, count=3):
  return [
    {
      "Flickr30K_ID": f"{100 + n}",
      "pairID": f"{100 + n}.jpg#1r1n",
      "sentence1": "A cat.",
      "sentence2": f"A dog {split} {n}.",
      "gold_label": ("neutral", "entailment", "contradiction")[n],
      "annotator_labels": ["neutral"],
    }
    for n in range(count)
  ]


def test_snli_ve(tmp_path):
  write(tmp_path, {f"flickr30k-images/{100 + n}.jpg": picture(n) for n in range(3)})
  write(
    tmp_path, {f"snli_ve_{split}.jsonl": lines(snli(split)) for split in ("train", "dev", "test")}
  )
  write(
    tmp_path, {"snli_ve_dev.jsonl": lines([*snli("dev"), snli("dev")[0] | {"gold_label": "-"}])}
  )
  printed = prepare("snli_ve", tmp_path)
  assert "note: 1 sentences without a majority label were left out" in printed
  assert read(tmp_path / "ve_train.json")[0] == {
    "image": "100",
    "sentence": "A dog train 0.",
    "label": "neutral",
  }
  found = records(*configs(printed), "train", "val", "test")
  assert [len(split) for split in found] == [3, 3, 3]
  assert found[1][1]["images"] == [f"{tmp_path}/flickr30k-images/101.jpg"]
  out = tmp_path / "elsewhere"
  found = records(*configs(prepare("snli_ve", tmp_path, f"--out={out}")), "train", "val", "test")
  assert found[1][1]["images"] == [f"{tmp_path}/flickr30k-images/101.jpg"]
  write(tmp_path, {"snli_ve_dev.jsonl": lines([snli("dev")[0] | {"gold_label": "maybe"}])})
  refused(
    "snli_ve",
    tmp_path,
    "snli_ve_dev.jsonl, line 1: gold_label 'maybe' is not one of",
    options=["--overwrite"],
  )
  (tmp_path / "snli_ve_dev.jsonl").unlink()
  refused(
    "snli_ve", tmp_path, "lacks snli_ve_dev.jsonl", "(SNLI-VE's dev split)", options=["--overwrite"]
  )


# ---- clips


def test_msrvtt(tmp_path):
  write(
    tmp_path,
    {
      "MSRVTT_JSFUSION_test.csv": 'key,vid_key,video_id,sentence\nret0,msr7,video7,"a cat, a '
      'dog"\nret1,msr8,video8,a dog\n',
      "test_videodatainfo.json": {
        "info": {},
        "videos": [
          {"video_id": f"video{n}", "split": split, "id": n}
          for n, split in ((7, "test"), (6, "train"))
        ],
        "sentences": [
          {"caption": "no", "video_id": "video6", "sen_id": 0},
          {"caption": "a cat", "video_id": "video7", "sen_id": 1},
          {"caption": "it", "video_id": "video7", "sen_id": 2},
        ],
      },
    },
  )
  write_clips(tmp_path / "videos", "video7.mp4", "video8.mp4")
  printed = prepare("msrvtt", tmp_path)
  assert printed[1] == (
    f"evaluate: python -m mplug_jax.main --mode=evaluate --checkpoint=RUN "
    f"--config=configs/video_retrieval.py:large,"
    f"data=msrvtt,root={tmp_path} --config.tokenizer.path=vocab.txt"
  )
  assert [r["caption"] for r in records(*configs(printed), "test")[0]] == ["a cat, a dog", "a dog"]
  (tmp_path / "MSRVTT_JSFUSION_test.csv").unlink()
  printed = prepare("msrvtt", tmp_path, f"--out={tmp_path}/whole")
  assert "this is the whole test split" in printed[1]
  (c,) = configs(printed)
  assert [r["caption"] for r in records(c, "test")[0]] == [
    "a cat",
    "it",
  ]
  assert c.data.image_root == f"{tmp_path}/videos"
  write(
    tmp_path,
    {
      "test_videodatainfo.json": {
        "videos": [],
        "sentences": [{"caption": "a cat", "video_id": "video7"}],
      }
    },
  )
  refused(
    "msrvtt",
    tmp_path,
    "sentences, entry 1: video_id 'video7' is not among the videos",
    options=["--overwrite"],
  )
  (tmp_path / "test_videodatainfo.json").unlink()
  refused(
    "msrvtt",
    tmp_path,
    "lacks test_videodatainfo.json",
    "MSRVTT_JSFUSION_test.csv",
    options=["--overwrite"],
  )


def qa(*rows):
  return [
    {"answer": answer, "category_id": 1, "id": n, "question": "what is it?", "video_id": number}
    for n, (number, answer) in enumerate(rows)
  ]


def test_questions_about_clips(tmp_path):
  write_zip(
    tmp_path / "MSRVTT-QA.zip",
    {
      "MSRVTT-QA/train_qa.json": qa((1, "dog"), (1, "cat"), (2, "cat")),
      "MSRVTT-QA/test_qa.json": qa((7, "cat"), (8, "mat")),
    },
  )
  write_clips(tmp_path / "TestVideo", "video7.mp4", "video8.mp4")
  (c,) = configs(prepare("msrvtt_qa", tmp_path))
  (found,) = records(c, "test")
  assert [r["questions"][0]["answers"] for r in found] == [["cat"], ["mat"]]
  assert found[0]["image"] == f"{tmp_path}/TestVideo/video7.mp4"
  assert vqa.answer_list(c.data) == ["cat", "dog"]
  assert c.data.test_file == f"{tmp_path}/msrvtt_qa/test.jsonl"
  write_clips(tmp_path / "videos", "video8.mp4")
  (tmp_path / "TestVideo/video8.mp4").unlink()
  refused(
    "msrvtt_qa",
    tmp_path,
    f"Clips are in {tmp_path}/TestVideo and in {tmp_path}/videos; put all",
    options=["--overwrite"],
  )


def test_msvd_names_its_clips_elsewhere(tmp_path):
  write(
    tmp_path,
    {
      "train_qa.json": qa((1, "dog")),
      "test_qa.json": qa((1301, "cat")),
      "youtube_mapping.txt": "-4ws_5_15 vid1301\n",
    },
  )
  write_clips(tmp_path / "YouTubeClips", "clip.mp4")
  (tmp_path / "YouTubeClips/clip.mp4").rename(tmp_path / "YouTubeClips/-4ws_5_15.avi")
  (c,) = configs(prepare("msvd_qa", tmp_path))
  (found,) = records(c, "test")
  assert found[0]["image"] == f"{tmp_path}/YouTubeClips/-4ws_5_15.avi"
  assert len(video.read_clip(found[0]["image"], 2)) == 2
  with tarfile.open(tmp_path / "YouTubeClips.tar", "w") as file:
    file.add(tmp_path / "YouTubeClips", "YouTubeClips")
  (tmp_path / "YouTubeClips/-4ws_5_15.avi").unlink()
  (found,) = records(*configs(prepare("msvd_qa", tmp_path, "--overwrite")), "test")
  assert found[0]["image"] == f"{tmp_path}/YouTubeClips.tar/YouTubeClips/-4ws_5_15.avi"
  assert len(video.read_clip(found[0]["image"], 2)) == 2
  write(tmp_path, {"test_qa.json": qa((1302, "cat"))})
  refused(
    "msvd_qa",
    tmp_path,
    "test_qa.json, entry 1:",
    "youtube_mapping.txt has no clip vid1302",
    options=["--overwrite"],
  )
  for line, problem in (("-4ws", "has no name and number"), ("x vid1301", "gives another name")):
    (tmp_path / "youtube_mapping.txt").write_text(f"-4ws_5_15 vid1301\n\n{line}\n")
    refused(
      "msvd_qa",
      tmp_path,
      f"youtube_mapping.txt, line 3: '{line}' {problem}",
      options=["--overwrite"],
    )
  (tmp_path / "youtube_mapping.txt").unlink()
  refused(
    "msvd_qa",
    tmp_path,
    "vid1302.mp4 is not in YouTubeClips or videos or video or",
    "(the clips of MSVD)",
    options=["--overwrite"],
  )
  (tmp_path / "train_qa.json").unlink()
  refused(
    "msvd_qa",
    tmp_path,
    "lacks train_qa.json or",
    "(MSVD-QA, the train questions)",
    options=["--overwrite"],
  )


def test_vatex(tmp_path):
  write(
    tmp_path,
    {
      "vatex_validation_v1.0.json": [
        {"videoID": f"abc_00000{n}_000011", "enCap": ["A cat.", "it runs"], "chCap": []}
        for n in range(2)
      ]
    },
  )
  write_clips(tmp_path / "videos", "abc_000000_000011.mp4")
  printed = prepare("vatex", tmp_path)
  assert printed[:2] == [
    f"wrote {tmp_path}/test.json: 1 clips",
    "note: 1 of the clips of VATEX are missing, for instance abc_000001_000011.mp4; their "
    "annotations were dropped",
  ]
  assert [r["captions"] for r in records(*configs(printed), "test")[0]] == [["a cat.", "it runs"]]
  write(tmp_path, {"vatex_validation_v1.0.json": [{"videoID": "abc", "enCap": []}]})
  refused(
    "vatex",
    tmp_path,
    "entry 1: enCap must be a list of at least one string.",
    options=["--overwrite"],
  )
  (tmp_path / "vatex_validation_v1.0.json").unlink()
  refused(
    "vatex",
    tmp_path,
    "lacks vatex_public_test_english_v1.1.json (the public test captions of VATEX)",
    options=["--overwrite"],
  )
