"""Downloads of caption data sets for the tests."""

from tests.support import word_list
from tests.support.downloads import (
  picture,
  write,
  write_zip,
)

WORDS = ["a", "red", "blue", "green", "cat", "dog", "on", "the", "mat", "sits", "runs"]


SPLITS = ("train", "train", "restval", "val", "test")


def name_of(number):
  return f"COCO_{'train' if number < 2 else 'val'}2014_{number + 7:012d}.jpg"


def part_of(number):
  return f"{'train' if number < 2 else 'val'}2014"


def texts(number):
  return [
    f"A {WORDS[1 + number % 3]} {WORDS[4 + number % 2]} sits. ",
    f"the {WORDS[4 + number % 2]} runs on the mat",
  ]


def karpathy(splits=SPLITS, coco=True):
  """In the layout of Karpathy's files."""
  images = []
  for number, split in enumerate(splits):
    sentences = [
      {"tokens": text.lower().split(), "raw": text, "imgid": number, "sentid": 2 * number + i}
      for i, text in enumerate(texts(number))
    ]
    more = {"filepath": part_of(number), "cocoid": number + 7} if coco else {}
    images.append(
      {
        "filename": name_of(number) if coco else f"{1000 + number}.jpg",
        "imgid": number,
        "split": split,
        "sentences": sentences,
        "sentids": [sentence["sentid"] for sentence in sentences],
        **more,
      }
    )
  return {"images": images, "dataset": "coco" if coco else "flickr30k"}


def coco(numbers):
  """In the format of COCO's captions."""
  return {
    "info": {},
    "licenses": [{"id": 1}],
    "images": [
      {"license": 1, "file_name": name_of(n), "height": 24, "width": 32, "id": n + 7}
      for n in numbers
    ],
    "annotations": [
      {"image_id": n + 7, "id": 10 * n + i, "caption": text}
      for n in numbers
      for i, text in enumerate(texts(n))
    ],
  }


def coco_images():
  return {f"{part_of(n)}/{name_of(n)}": picture(n) for n in range(5)}


def make_folder(tmp_path_factory):
  """COCO as downloaded, with Karpathy's splits and Visual Genome; vocab.txt."""
  folder = tmp_path_factory.mktemp("coco")
  write_zip(
    folder / "caption_datasets.zip", {"dataset_coco.json": karpathy(), "dataset_flickr8k.json": {}}
  )
  for part in ("train2014", "val2014"):
    write_zip(
      folder / f"{part}.zip",
      {name: value for name, value in coco_images().items() if name.startswith(part)},
    )
  regions = [
    {
      "id": n,
      "regions": [
        {
          "region_id": 10 * n + i,
          "width": 3,
          "height": 3,
          "image_id": n,
          "phrase": text,
          "x": 0,
          "y": 0,
        }
        for i, text in enumerate(("a red cat ", "the mat", "a red cat", " "))
      ],
    }
    for n in (1, 2, 3)
  ]
  write_zip(folder / "region_descriptions.json.zip", {"region_descriptions.json": regions})
  write(
    folder,
    {
      "image_data.json": [
        {
          "image_id": n,
          "coco_id": coco_id,
          "flickr_id": None,
          "width": 32,
          "height": 24,
          "url": "http://x",
        }
        for n, coco_id in ((1, None), (2, 8), (3, 11))
      ],
      "VG_100K/1.jpg": picture(1),
      "VG_100K_2/2.jpg": picture(2),
      "VG_100K_2/3.jpg": picture(3),
      "vocab.txt": word_list.text(*WORDS),
    },
  )
  return folder
