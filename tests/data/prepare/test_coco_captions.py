"""COCO captions of its own splits, Flickr30k and NoCaps, prepared from downloads."""

import io
import tarfile

import pytest

from tests.support.captions_case import (
  coco,
  coco_images,
  karpathy,
  name_of,
  texts,
)
from tests.support.downloads import (
  configs,
  picture,
  prepare,
  read,
  records,
  refused,
  write,
  write_zip,
)


def test_cocos_own_splits(tmp_path):
  write_zip(
    tmp_path / "annotations_trainval2014.zip",
    {
      "annotations/captions_train2014.json": coco((0, 1)),
      "annotations/captions_val2014.json": coco((2, 3, 4)),
    },
  )
  write(tmp_path, coco_images())
  own = coco((0, 1))
  own["annotations"].append({"image_id": 7, "id": 99, "caption": " \n"})  # COCO has such
  write(tmp_path, {"captions_train2014.json": own, "captions_val2014.json": coco((2, 3, 4))})
  printed = prepare("coco_captions", tmp_path)
  assert any("these are COCO's own splits" in line for line in printed)
  assert not (tmp_path / "caption_test.json").exists()
  caption, retrieval = configs(printed)
  assert caption.eval.split == retrieval.eval.split == "val"
  assert [len(split) for split in records(caption, "train", "val")] == [2, 3]
  assert len(read(tmp_path / "coco_train.json")) == 4
  for part in ("train", "val"):
    (tmp_path / f"captions_{part}2014.json").unlink()
  prepare("coco_captions", tmp_path, "--overwrite")
  assert len(read(tmp_path / "coco_train.json")) == 4
  assert [[r["caption"] for r in split] for split in records(retrieval, "val")][0][:2] == [
    text.strip().lower() for text in texts(2)
  ]
  (tmp_path / "caption_train.json").unlink()
  refused("coco_captions", tmp_path, "caption_val.json exists")
  for name in ("caption_val.json", "coco_train.json", "coco_val.json"):
    (tmp_path / name).unlink()
  for change, message in (
    (
      {"annotations": coco((0,))["annotations"]},
      "captions_train2014.json, images, entry 2: the image has no caption",
    ),
    (
      {"annotations": [{"image_id": 3, "caption": ""}]},
      "annotations, entry 1: image_id 3 is no image of the file",
    ),
    ({"images": 2 * coco((0,))["images"]}, "images, entry 2: image id 7 is repeated"),
  ):
    write(
      tmp_path,
      {"captions_train2014.json": coco((0, 1)) | change, "captions_val2014.json": coco((2,))},
    )
    refused("coco_captions", tmp_path, message)
  write(tmp_path, {"captions_train2014.json": coco((0, 1))})
  (tmp_path / "captions_val2014.json").unlink()
  (tmp_path / "annotations_trainval2014.zip").unlink()
  refused("coco_captions", tmp_path, "lacks captions_val2014.json", "the annotations of COCO 2014")
  (tmp_path / "captions_train2014.json").unlink()
  refused(
    "coco_captions", tmp_path, "lacks dataset_coco.json or caption_datasets.zip/dataset_coco.json"
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"split": "dev"},
      "dataset_coco.json, images, entry 2: split 'dev' is not one of train, restval, val, test.",
    ),
    ({"sentences": [], "sentids": []}, "entry 2: the image has no caption"),
    (
      {"sentids": [1, 2, 3]},
      "entry 2: it lists 3 sentids and has 2 sentences; get the file again.",
    ),
    ({"sentences": [{"tokens": []}]}, "entry 2, sentences: key 'raw' is missing."),
    ({"cocoid": "8"}, "entry 2: cocoid must be a whole number."),
    (
      {"filename": "x.jpg"},
      "1 of the train2014 and val2014 images of COCO are missing, for instance train2014/x.jpg",
    ),
    ({"sentids": None}, "entry 2: sentids must be a list."),
  ],
)
def test_karpathys_file_is_checked(tmp_path, change, message):
  content = karpathy()
  content["images"][1] |= change
  write(tmp_path, {"dataset_coco.json": content, **coco_images()})
  refused("coco_captions", tmp_path, message)


def test_a_split_without_images(tmp_path):
  write(
    tmp_path,
    {"dataset_coco.json": karpathy(("train", "train", "train", "val", "val")), **coco_images()},
  )
  refused(
    "coco_captions",
    tmp_path,
    f"{tmp_path}/caption_test.json would have no entry; check that the annotations and the images",
  )


def test_flickr30k(tmp_path):
  write(tmp_path, {"flickr30k-images/" + f"{1000 + n}.jpg": picture(n) for n in range(5)})
  write(
    tmp_path,
    {"dataset_flickr30k.json": karpathy(("train", "train", "train", "val", "test"), coco=False)},
  )
  printed = prepare("flickr30k", tmp_path)
  expected = records(*configs(printed), "train", "val", "test")
  assert [len(split) for split in expected] == [6, 2, 2]
  assert read(tmp_path / "flickr30k_train.json")[0] == {
    "image": "flickr30k-images/1000.jpg",
    "caption": texts(0)[0].strip(),
    "image_id": "flickr30k_1000",
  }
  # The same from its own captions and the splits of the Entities.
  (tmp_path / "dataset_flickr30k.json").unlink()
  tokens = "".join(
    f"{1000 + n}.jpg#{i}\t{text}\n" for n in range(5) for i, text in enumerate(texts(n))
  )
  write(
    tmp_path,
    {"results_20130124.token": tokens, "train.txt": "1000\n1001\n1002\n", "val.txt": "1003\n"},
  )
  refused(
    "flickr30k",
    tmp_path,
    "lacks test.txt or flickr30k_entities/test.txt (the splits of Flickr30k Entities)",
  )
  write(tmp_path, {"test.txt": "1004\n"})
  printed = prepare("flickr30k", tmp_path, "--overwrite")
  assert records(*configs(printed), "train", "val", "test") == expected
  write(tmp_path, {"test.txt": "1004\n1003\n"})
  refused(
    "flickr30k",
    tmp_path,
    "test.txt, line 2:",
    "has no caption of image 1003.jpg",
    options=["--overwrite"],
  )
  write(tmp_path, {"results_20130124.token": "1000.jpg a dog\n"})
  refused(
    "flickr30k",
    tmp_path,
    "results_20130124.token, line 1: must be an image, #,",
    options=["--overwrite"],
  )
  (tmp_path / "results_20130124.token").unlink()
  refused("flickr30k", tmp_path, "lacks dataset_flickr30k.json", options=["--overwrite"])


def test_nocaps(tmp_path):
  content = coco((0, 1)) | {"licenses": []}
  for image, domain in zip(content["images"], ("in-domain", "out-domain")):
    image.update(domain=domain, open_images_id="x")
  write(
    tmp_path,
    {
      "nocaps_val_4500_captions.json": content,
      "nocaps_test_image_info.json": {"images": coco((2,))["images"]},
      **{f"validation/{name_of(n)}": picture(n) for n in (0, 1)},
      f"test/{name_of(2)}": picture(2),
    },
  )
  printed = prepare("nocaps", tmp_path)
  assert printed[-1] == (
    f"evaluate: python -m mplug_jax.main --mode=evaluate --checkpoint=RUN "
    f"--config=configs/caption.py:base,data=nocaps,root={tmp_path} "
    f"--config.tokenizer.path=vocab.txt"
  )
  val, test = records(*configs(printed), "val", "test")
  assert [(r["image_id"], r["domain"], len(r["captions"])) for r in val] == [
    (7, "in-domain", 2),
    (8, "out-domain", 2),
  ]
  (tmp_path / "test" / name_of(2)).rename(tmp_path / "x.jpg")
  assert "note: the test images are missing, so there is no test split" in prepare(
    "nocaps", tmp_path, "--overwrite"
  )
  assert test[0]["captions"] == []
  assert test[0]["image"] == f"{tmp_path}/test/{name_of(2)}"


def test_visual_genome_without_karpathys_splits(tmp_path):
  write(
    tmp_path,
    {
      "image_data.json": [{"image_id": 1, "coco_id": 5}, {"image_id": 3, "coco_id": 6}],
      "vg/VG_100K/1.jpg": picture(1),
      "region_descriptions.json": [
        {"id": 1, "regions": [{"phrase": "a cat"}]},
        {"id": 3, "regions": [{"phrase": " "}]},
      ],
    },
  )
  printed = "\n".join(prepare("visual_genome", tmp_path))
  assert "images of COCO's val and test splits were kept" in printed
  assert "note: 1 images without a description were left out" in printed
  assert "pre-training is evaluated on COCO, whose files" in printed
  write(tmp_path, {"region_descriptions.json": [{"id": 2, "regions": []}]})
  refused(
    "visual_genome",
    tmp_path,
    "region_descriptions.json, entry 1: image id 2 is not in",
    options=["--overwrite"],
  )


def test_conceptual_captions_and_sbu(tmp_path):
  write(
    tmp_path,
    {
      "Train_GCC-training.tsv": "a red cat\thttp://a.b/x/cat.jpg?size=3\na "
      "dog\thttp://a.b/1.jpg\nthe mat\thttp://c.d/1.jpg\n"
      "a blue cat\thttp://a.b/none.jpg\n \thttp://a.b/empty.jpg\n",
      "cc/images/cat.jpg": picture(),
      "cc/images/1.jpg": picture(),
      "dataset/SBU_captioned_photo_dataset_captions.txt": "a red cat\na dog\n",
      "dataset/SBU_captioned_photo_dataset_urls.txt": "http://s.f/1_a.jpg\nhttp://s.f/2_b.jpg\n",
      "sbu/images/2_b.jpg": picture(),
      "coco_train.json": [{"image": "cc/images/1.jpg", "caption": "a cat", "image_id": "coco_1"}],
    },
  )
  printed = prepare("cc", tmp_path)
  assert read(tmp_path / "cc.json") == [
    {"image": "cc/images/cat.jpg", "caption": "a red cat"}
  ]  # two are called 1.jpg
  assert printed[1] == (
    "note: 1 of the images of cc that were to be downloaded are missing, for instance none.jpg; "
    "their annotations were dropped"
  )
  assert printed[2:4] == [
    "note: 2 pairs whose address ends like another or with no name were left out",
    "note: 1 pairs without a caption were left out",
  ]
  assert len(records(*configs(printed), "train")[0]) == 2
  printed = prepare("sbu", tmp_path)
  assert "sets=coco_train/cc/sbu," in printed[-1]  # with what was written before
  assert len(records(*configs(printed), "train")[0]) == 3
  assert read(tmp_path / "sbu.json") == [{"image": "sbu/images/2_b.jpg", "caption": "a dog"}]
  write(
    tmp_path,
    {
      "dataset/SBU_captioned_photo_dataset_urls.txt": "http://s.f/1_a.jpg\n",
      "Train_GCC-training.tsv": "a cat\n",
    },
  )
  refused(
    "sbu",
    tmp_path,
    "must have corresponding lines, but one of them has more",
    options=["--overwrite"],
  )
  refused(
    "cc",
    tmp_path,
    "Train_GCC-training.tsv, line 1: must be a caption, a tab and",
    options=["--overwrite"],
  )
  (tmp_path / "Train_GCC-training.tsv").unlink()
  refused("cc", tmp_path, "lacks Train_GCC-training.tsv", options=["--overwrite"])
  refused(
    "sbu",
    tmp_path / "dataset",
    "has no folder sbu/images or images; put the downloaded images there.",
  )


def test_images_that_img2dataset_downloaded(tmp_path):
  parquet = pytest.importorskip("pyarrow.parquet")
  pyarrow = pytest.importorskip("pyarrow")

  def shard(number, **columns):
    parquet.write_table(
      pyarrow.table(
        {
          "key": [f"{number:05d}{i:04d}" for i in range(2)],
          "status": ["success", "failed_to_download"],
          "url": ["http://a/1", "http://a/2"],
          **columns,
        }
      ),
      tmp_path / f"images/{number:05d}.parquet",
    )

  write(
    tmp_path,
    {
      "images/00000/000000000.jpg": picture(),
      "coco_train.json": [{"image": "images/00000/000000000.jpg", "caption": "a cat"}],
    },
  )
  with tarfile.open(tmp_path / "images/00001.tar", "w") as file:
    member = tarfile.TarInfo("000010000.jpg")
    member.size = len(picture())
    file.addfile(member, io.BytesIO(picture()))
  for number in (0, 1):
    shard(number, caption=[f"a cat {number}", "a dog"])
  printed = prepare("cc", tmp_path)
  assert read(tmp_path / "cc.json") == [
    {"image": "images/00000/000000000.jpg", "caption": "a cat 0"},
    {"image": "images/00001.tar/000010000.jpg", "caption": "a cat 1"},
  ]
  assert "note: 2 images that img2dataset could not download were left out" in printed
  assert len(records(*configs(printed), "train")[0]) == 3
  shard(1)
  refused(
    "cc",
    tmp_path,
    "00001.parquet has no column caption; run img2dataset again with --caption_col",
    options=["--overwrite"],
  )
