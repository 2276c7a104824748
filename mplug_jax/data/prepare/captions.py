"""Captions: COCO and Flickr30k in Karpathy's splits or their own, NoCaps -> the official json files of captioning and retrieval."""

from mplug_jax.data.prepare import json_stream
from mplug_jax.data.prepare.download import Images, Wanted, zipped
from mplug_jax.data.storage import tabular

_SPLIT_OF = {
  "train": "train",
  "restval": "train",
  "val": "val",
  "test": "test",
}  # by Karpathy's name of it
_IMAGE = {"id": int, "file_name": str}  # of COCO's format


def _karpathy(name):
  return zipped(
    f"dataset_{name}.json",
    f"Karpathy's splits, caption_datasets.zip: dataset_{name}.json",
    "caption_datasets.zip",
  )


def _coco_captions(part):
  return zipped(
    f"captions_{part}.json",
    "the annotations of COCO 2014, annotations_trainval2014.zip",
    "annotations_trainval2014.zip",
    folders=("", "annotations"),
    inner="annotations",
  )


class _Writer:
  """Writes the files of captioning (optional) and of retrieval for some splits.

  Args:
    prefix: of the names of the files of retrieval. captions: whether those of captioning are
      wanted.
  """

  def __init__(self, out, splits, prefix, captions=True):
    self._captions = (
      {split: out.entries(f"caption_{split}.json", "images") for split in splits}
      if captions
      else {}
    )
    self._pairs = {
      split: out.entries(f"{prefix}_{split}.json", "captions" if split == "train" else "images")
      for split in splits
    }
    self._prefix = prefix

  def add(self, split, image, image_id, texts, more=None):
    """more: further fields of the entry for captioning."""
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


def coco_captions(download, out):
  """COCO captions in Karpathy's splits, or in COCO's own without a test split, for captioning and retrieval."""
  own = [_coco_captions(part) for part in ("train2014", "val2014")]
  path = download.find(_karpathy("coco"))
  # Without either, the message is about what the paper uses.
  paths = None if path else download.all_or_none(*own) or download.require(_karpathy("coco"))
  images = Images(
    download,
    "the train2014 and val2014 images of COCO",
    ("", "images", "coco", "train2014.zip", "val2014.zip"),
    out.folder,
  )
  writer = _Writer(out, ("train", "val", "test") if path else ("train", "val"), "coco")
  if path:
    for entry, split, texts, where in _karpathy_images(path):
      json_stream.check(entry, {"filepath": str, "cocoid": int}, where)
      if image := images(f"{entry['filepath']}/{entry['filename']}"):
        writer.add(split, image, entry["cocoid"], texts, {"cocoid": entry["cocoid"]})
  else:
    out.note(
      "dataset_coco.json of caption_datasets.zip is not there, so these are COCO's own splits; "
      "results on Karpathy's differ"
    )
    for split, part, file in zip(("train", "val"), ("train2014", "val2014"), paths):
      for entry, texts, where in _coco_images(file):
        if not texts:
          raise ValueError(f"{where}: the image has no caption; get the file again.")
        if image := images(f"{part}/{entry['file_name']}"):
          writer.add(split, image, entry["id"], texts, {"cocoid": entry["id"]})
  images.finish(out)
  flags = {} if path else {"eval.split": "val"}
  out.command("caption", "base", "data=karpathy", f"root={out.folder}", flags=flags, mode="train")
  out.command("retrieval", "base", "data=coco", f"root={out.folder}", flags=flags, mode="train")


def _karpathy_images(path):
  """(entry, split, captions, where) of a file of Karpathy's.

  Raises ValueError, also if it has fewer captions than it lists ids of.
  """
  for entry, where in json_stream.entries(
    path, {"filename": str, "split": str, "sentences": list, "sentids": list}, "images"
  ):
    if entry["split"] not in _SPLIT_OF:
      raise ValueError(f"{where}: split {entry['split']!r} is not one of {', '.join(_SPLIT_OF)}.")
    for sentence in entry["sentences"]:
      json_stream.check(sentence, {"raw": str}, f"{where}, sentences")
    if len(entry["sentids"]) != len(entry["sentences"]):
      raise ValueError(
        f"{where}: it lists {len(entry['sentids'])} sentids and has {len(entry['sentences'])} "
        f"sentences; get the file "
        "again."
      )
    texts = [text for sentence in entry["sentences"] if (text := sentence["raw"].strip())]
    if not texts:
      raise ValueError(f"{where}: the image has no caption; get the file again.")
    yield entry, _SPLIT_OF[entry["split"]], texts, where


def _coco_images(path):
  """(image, captions, where) of a file in the format of COCO captions. Raises ValueError."""
  found = {}
  for entry, where in json_stream.entries(path, _IMAGE, "images"):
    if entry["id"] in found:
      raise ValueError(f"{where}: image id {entry['id']} stands there twice.")
    found[entry["id"]] = entry, [], where
  for entry, where in json_stream.entries(path, {"image_id": int, "caption": str}, "annotations"):
    if entry["image_id"] not in found:
      raise ValueError(
        f"{where}: image_id {entry['image_id']!r} is no image of the file; get the file again."
      )
    if text := entry["caption"].strip():
      found[entry["image_id"]][1].append(text)
  return found.values()


_TOKENS = Wanted(
  "the captions of Flickr30k",
  tuple(f"{folder}results_20130124.token" for folder in ("", "flickr30k/")),
)
_LISTS = [
  Wanted("the splits of Flickr30k Entities", (f"{split}.txt", f"flickr30k_entities/{split}.txt"))
  for split in ("train", "val", "test")
]


def flickr30k(download, out):
  """Flickr30k in Karpathy's splits, or its own captions in the splits of Flickr30k Entities, for retrieval."""
  path = download.find(_karpathy("flickr30k"))
  paths = (
    None
    if path
    else download.require(
      *((_TOKENS, *_LISTS) if download.find(_TOKENS) else (_karpathy("flickr30k"),))
    )
  )
  folders = (
    "flickr30k-images",
    "flickr30k_images",
    "images",
    "flickr30k-images.zip/flickr30k-images",
    "",
  )
  images = Images(download, "the images of Flickr30k", folders, out.folder)
  writer = _Writer(out, ("train", "val", "test"), "flickr30k", captions=False)
  if path:
    found = ((entry["filename"], split, texts) for entry, split, texts, _ in _karpathy_images(path))
  else:
    found = _token_images(*paths)
  for name, split, texts in found:
    if image := images(name):
      writer.add(split, image, name.removesuffix(".jpg"), texts)
  images.finish(out)
  out.command("retrieval", "base", "data=flickr30k", f"root={out.folder}", mode="train")


def _token_images(tokens, *lists):
  """(name, split, captions) of results_20130124.token, lines "1000092795.jpg#0<tab>caption", and of lists of images. Raises ValueError."""
  captions = {}
  for number, line in enumerate(tabular.lines(tokens), 1):
    name, tab, text = line.rstrip("\r\n").partition("\t")
    name, hash_, _ = name.partition("#")
    if not (tab and hash_ and name and text.strip()):
      raise ValueError(
        f"{tokens}, line {number}: must be an image, #, the caption's number, a tab and the "
        f"caption."
      )
    captions.setdefault(name, []).append(text.strip())
  for split, path in zip(("train", "val", "test"), lists):
    for number, line in enumerate(tabular.lines(path), 1):
      if name := line.strip():
        name = f"{name.removesuffix('.jpg')}.jpg"
        if name not in captions:
          raise ValueError(
            f"{path}, line {number}: {tokens} has no caption of image {name}, or it is in two "
            f"splits."
          )
        yield name, split, captions.pop(name)


_NOCAPS = (
  Wanted("the validation captions of NoCaps", ("nocaps_val_4500_captions.json",)),
  Wanted("the test images of NoCaps", ("nocaps_test_image_info.json",)),
)


def nocaps(download, out):
  """NoCaps, to evaluate captioning outside COCO's objects; its test split has no captions."""
  paths = {"val": download.require(_NOCAPS[0])[0], "test": download.find(_NOCAPS[1])}
  for split, path in paths.items():
    if path is None:
      out.note("nocaps_test_image_info.json is not there, and so no test split")
      continue
    images = Images(
      download,
      f"the {split} images of NoCaps, of Open Images",
      ("images", split, "validation", f"{split}.zip/{split}"),
      f"{out.folder}/images",
    )
    content = {"images": [], "annotations": []}
    read = (
      _coco_images(path)
      if split == "val"
      else [(e, [], w) for e, w in json_stream.entries(path, _IMAGE, "images")]
    )
    if split == "test" and not any(images.has(entry["file_name"]) for entry, *_ in read[:1]):
      out.note("the test images are not there, and so no test split")
      continue
    for entry, texts, where in read:
      if split == "val" and not texts:
        raise ValueError(f"{where}: the image has no caption; get the file again.")
      if image := images(entry["file_name"]):
        content["images"].append(
          {key: entry[key] for key in ("id", "domain") if key in entry} | {"file_name": image}
        )
        content["annotations"] += [{"image_id": entry["id"], "caption": text} for text in texts]
    images.finish(out)
    out.value(
      f"caption_{split}.json",
      content,
      f"{len(content['images']):,} images, {len(content['annotations']):,} captions",
    )
  out.command("caption", "base", "data=nocaps", f"root={out.folder}", mode="evaluate")
