"""COCO captions, Flickr30k and NoCaps: the official JSON files of captioning and retrieval.

COCO and Flickr30k have Karpathy's splits or their own.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from mplug_jax.data.errors import note
from mplug_jax.data.prepare import json_stream
from mplug_jax.data.prepare.dataset import Dataset
from mplug_jax.data.prepare.download import Download, Images, Wanted, zipped
from mplug_jax.data.prepare.writer import Output
from mplug_jax.data.storage import tabular

# Karpathy's name of a split -> ours.
_SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}
_IMAGE = {"id": int, "file_name": str}  # in COCO's format


def _karpathy(name: str) -> Wanted:
  return zipped(
    f"dataset_{name}.json",
    f"Karpathy's splits, caption_datasets.zip: dataset_{name}.json",
    "caption_datasets.zip",
  )


def _coco_annotations(part: str) -> Wanted:
  return zipped(
    f"captions_{part}.json",
    "the annotations of COCO 2014, annotations_trainval2014.zip",
    "annotations_trainval2014.zip",
    folders=("", "annotations"),
    inner="annotations",
  )


class _Writer:
  """Writes the files of retrieval and, optionally, of captioning for some splits."""

  def __init__(self, out: Output, splits: Iterable[str], prefix: str, captions: bool = True):
    """Starts the files.

    Args:
      out: where they are written.
      splits: ours.
      prefix: begins the names of the files of retrieval.
      captions: whether to write the files of captioning.
    """
    splits = tuple(splits)
    captioned = splits if captions else ()
    self._captions = {split: out.entries(f"caption_{split}.json", "images") for split in captioned}
    self._pairs = {
      split: out.entries(f"{prefix}_{split}.json", "captions" if split == "train" else "images")
      for split in splits
    }
    self._prefix = prefix

  def add(
    self,
    split: str,
    image: str,
    image_id: int | str,
    texts: Sequence[str],
    more: dict[str, Any] | None = None,
  ) -> None:
    """Adds an image with its captions; `more` has further fields for captioning."""
    if split in self._captions:
      folder, _, name = image.rpartition("/")
      self._captions[split].add(
        {
          "filename": name,
          "filepath": folder,
          **(more or {}),
          "sentences": [{"raw": text} for text in texts],
        }
      )
    if split == "train":
      for text in texts:
        self._pairs[split].add(
          {"image": image, "caption": text, "image_id": f"{self._prefix}_{image_id}"}
        )
    else:
      self._pairs[split].add({"image": image, "caption": texts})


def coco_captions(download: Download, out: Output) -> None:
  """Writes COCO captions in Karpathy's splits, or in COCO's own without a test split.

  Args:
    download: the downloaded files.
    out: where the files are written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  images = Images(
    download,
    "the train2014 and val2014 images of COCO",
    ("", "images", "coco", "train2014.zip", "val2014.zip"),
    out.folder,
  )
  path = download.find(_karpathy("coco"))
  flags = {}
  if path:
    _write_karpathy_coco(path, images, out)
  else:
    own = download.all_or_none(*map(_coco_annotations, ("train2014", "val2014")))
    # Without either, the error names the splits of the paper.
    paths = own or download.require(_karpathy("coco"))
    _write_official_coco(paths, images, out)
    flags = {"eval.split": "val"}
  images.finish(out)
  out.command("caption", "base", "data=karpathy", f"root={out.folder}", flags=flags, mode="train")
  out.command("retrieval", "base", "data=coco", f"root={out.folder}", flags=flags, mode="train")


def _write_karpathy_coco(path: str, images: Images, out: Output) -> None:
  """Writes the images of dataset_coco.json."""
  writer = _Writer(out, ("train", "val", "test"), "coco")
  for entry, split, texts, location in _karpathy_images(path):
    json_stream.check(entry, {"filepath": str, "cocoid": int}, location)
    if image := images(f"{entry['filepath']}/{entry['filename']}"):
      writer.add(split, image, entry["cocoid"], texts, {"cocoid": entry["cocoid"]})


def _write_official_coco(paths: Sequence[str], images: Images, out: Output) -> None:
  """Writes the images of COCO's own files."""
  writer = _Writer(out, ("train", "val"), "coco")
  out.note(
    "dataset_coco.json of caption_datasets.zip is missing, so these are COCO's own splits; results "
    "on Karpathy's differ"
  )
  for split, part, path in zip(("train", "val"), ("train2014", "val2014"), paths):
    for entry, texts, location in _coco_images(path):
      _require_caption(texts, location)
      if image := images(f"{part}/{entry['file_name']}"):
        writer.add(split, image, entry["id"], texts, {"cocoid": entry["id"]})


def _require_caption(texts: Collection[str], location: str) -> None:
  """Raises ValueError if there are no captions."""
  if not texts:
    raise ValueError(f"{location}: the image has no caption; get the file again.")


def _karpathy_images(path: str) -> Iterator[tuple[dict[str, Any], str, list[str], str]]:
  """Yields (entry, split, captions, location) of a file of Karpathy's.

  Raises ValueError, also for an entry with fewer captions than ids.
  """
  types = {"filename": str, "split": str, "sentences": list, "sentids": list}
  empty = 0
  for entry, location in json_stream.entries(path, types, "images"):
    if entry["split"] not in _SPLIT_OF:
      raise ValueError(
        f"{location}: split {entry['split']!r} is not one of {', '.join(_SPLIT_OF)}."
      )
    for sentence in entry["sentences"]:
      json_stream.check(sentence, {"raw": str}, f"{location}, sentences")
    if len(entry["sentids"]) != len(entry["sentences"]):
      raise ValueError(
        f"{location}: it lists {len(entry['sentids'])} sentids and has {len(entry['sentences'])} "
        "sentences; get the file again."
      )
    texts = [text for sentence in entry["sentences"] if (text := sentence["raw"].strip())]
    _require_caption(texts, location)
    empty += len(entry["sentences"]) - len(texts)
    yield entry, _SPLIT_OF[entry["split"]], texts, location
  _note_empty(path, empty)


def _coco_images(path: str) -> Collection[tuple[dict[str, Any], list[str], str]]:
  """Returns (image, captions, location) of a file in COCO's format; raises ValueError."""
  images: dict[int, tuple[dict[str, Any], list[str], str]] = {}
  for entry, location in json_stream.entries(path, _IMAGE, "images"):
    if entry["id"] in images:
      raise ValueError(f"{location}: image id {entry['id']} is repeated.")
    images[entry["id"]] = entry, [], location
  types = {"image_id": int, "caption": str}
  empty = 0
  for entry, location in json_stream.entries(path, types, "annotations"):
    if entry["image_id"] not in images:
      raise ValueError(
        f"{location}: image_id {entry['image_id']!r} is no image of the file; get the file again."
      )
    if text := entry["caption"].strip():
      images[entry["image_id"]][1].append(text)
    else:
      empty += 1
  _note_empty(path, empty)
  return images.values()


def _note_empty(path: str, count: int) -> None:
  """Tells how many captions of a file have no word."""
  if count:
    note(f"{path}: {count:,} captions without a word are left out.")


_TOKENS = Wanted(
  "the captions of Flickr30k",
  tuple(f"{folder}results_20130124.token" for folder in ("", "flickr30k/")),
)
_LISTS = [
  Wanted("the splits of Flickr30k Entities", (f"{split}.txt", f"flickr30k_entities/{split}.txt"))
  for split in ("train", "val", "test")
]


def flickr30k(download: Download, out: Output) -> None:
  """Writes Flickr30k in Karpathy's splits, or its own captions in those of Flickr30k Entities.

  Args:
    download: the downloaded files.
    out: where the files are written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  path = download.find(_karpathy("flickr30k"))
  if path:
    rows = ((entry["filename"], split, texts) for entry, split, texts, _ in _karpathy_images(path))
  else:
    wanted = (_TOKENS, *_LISTS) if download.find(_TOKENS) else (_karpathy("flickr30k"),)
    rows = _token_images(*download.require(*wanted))
  folders = (
    "flickr30k-images",
    "flickr30k_images",
    "images",
    "flickr30k-images.zip/flickr30k-images",
    "",
  )
  images = Images(download, "the images of Flickr30k", folders, out.folder)
  writer = _Writer(out, ("train", "val", "test"), "flickr30k", captions=False)
  for name, split, texts in rows:
    if image := images(name):
      writer.add(split, image, name.removesuffix(".jpg"), texts)
  images.finish(out)
  out.command("retrieval", "base", "data=flickr30k", f"root={out.folder}", mode="train")


def _token_images(tokens: str, *lists: str) -> Iterator[tuple[str, str, list[str]]]:
  """Yields (name, split, captions) of the files of Flickr30k; raises ValueError.

  Args:
    tokens: results_20130124.token, lines "1000092795.jpg#0<tab>caption".
    *lists: names of images, one file for each split.
  """
  captions: dict[str, list[str]] = {}
  for number, line in enumerate(tabular.lines(tokens), 1):
    name, tab, text = line.rstrip("\r\n").partition("\t")
    name, hash_, _ = name.partition("#")
    if not (tab and hash_ and name and text.strip()):
      raise ValueError(
        f"{tokens}, line {number}: must be an image, #, the caption's number, a tab and the "
        "caption."
      )
    captions.setdefault(name, []).append(text.strip())
  for split, path in zip(("train", "val", "test"), lists):
    for number, line in enumerate(tabular.lines(path), 1):
      if name := line.strip():
        name = f"{name.removesuffix('.jpg')}.jpg"
        if name not in captions:
          raise ValueError(
            f"{path}, line {number}: {tokens} has no caption of image {name}, or it is in two "
            "splits."
          )
        yield name, split, captions.pop(name)


_NOCAPS = {
  "val": Wanted("the validation captions of NoCaps", ("nocaps_val_4500_captions.json",)),
  "test": Wanted("the test images of NoCaps", ("nocaps_test_image_info.json",)),
}


def nocaps(download: Download, out: Output) -> None:
  """Writes NoCaps, to evaluate captioning of objects outside COCO; its test split has no captions.

  Args:
    download: the downloaded files.
    out: where the files are written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  paths = {"val": download.require(_NOCAPS["val"])[0], "test": download.find(_NOCAPS["test"])}
  for split, path in paths.items():
    if path is None:
      out.note("nocaps_test_image_info.json is missing, so there is no test split")
      continue
    images = Images(
      download,
      f"the {split} images of NoCaps, of Open Images",
      ("images", split, "validation", f"{split}.zip/{split}"),
      f"{out.folder}/images",
    )
    rows = _nocaps_rows(path, split)
    if split == "test" and not any(images.has(entry["file_name"]) for entry, *_ in rows[:1]):
      out.note("the test images are missing, so there is no test split")
      continue
    _write_nocaps(split, rows, images, out)
  out.command("caption", "base", "data=nocaps", f"root={out.folder}", mode="evaluate")


def _nocaps_rows(path: str, split: str) -> list[tuple[dict[str, Any], list[str], str]]:
  """Returns (image, captions, location) of a file of NoCaps."""
  if split == "val":
    return list(_coco_images(path))
  return [(entry, [], location) for entry, location in json_stream.entries(path, _IMAGE, "images")]


def _write_nocaps(
  split: str,
  rows: Iterable[tuple[dict[str, Any], list[str], str]],
  images: Images,
  out: Output,
) -> None:
  """Writes a split of NoCaps in COCO's format."""
  content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
  for entry, texts, location in rows:
    if split == "val":
      _require_caption(texts, location)
    if image := images(entry["file_name"]):
      kept = {key: entry[key] for key in ("id", "domain") if key in entry}
      content["images"].append(kept | {"file_name": image})
      content["annotations"] += [{"image_id": entry["id"], "caption": text} for text in texts]
  images.finish(out)
  title = f"{len(content['images']):,} images, {len(content['annotations']):,} captions"
  out.value(f"caption_{split}.json", content, title)


COCO_CAPTIONS = Dataset("COCO captions for captioning and retrieval.", coco_captions)
FLICKR30K = Dataset("Flickr30k for retrieval.", flickr30k)
NOCAPS = Dataset("NoCaps, to evaluate captioning of objects outside COCO.", nocaps)
