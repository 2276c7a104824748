"""Images with texts for pre-training: Visual Genome, Conceptual Captions, SBU -> the json files of configs/pretrain.py."""

import glob
import os
import posixpath
import urllib.parse

from mplug_jax.data.prepare import json_stream
from mplug_jax.data.prepare.download import Images, Wanted, zipped
from mplug_jax.data.storage import tabular

_REGIONS = zipped(
  "region_descriptions.json",
  "the regions of Visual Genome",
  "region_descriptions.json.zip",
  folders=("", "vg"),
)
_IMAGE_DATA = zipped(
  "image_data.json",
  "the image meta data of Visual Genome",
  "image_data.json.zip",
  folders=("", "vg"),
)
_KARPATHY = zipped(
  "dataset_coco.json", "Karpathy's splits of COCO", "caption_datasets.zip", folders=("", "coco")
)


def vg_images(download, image_root):
  """The Images of Visual Genome, which come in two parts."""
  folders = ("VG_100K", "VG_100K_2", "images.zip/VG_100K", "images2.zip/VG_100K_2")
  return Images(
    download,
    "the images of Visual Genome, parts 1 and 2",
    [top + name for name in folders for top in ("vg/", "")],
    image_root,
  )


def visual_genome(download, out):
  """Region descriptions of Visual Genome for pre-training, without images that COCO captioning is evaluated on."""
  regions, image_data = download.require(_REGIONS, _IMAGE_DATA)
  evaluated = _evaluated(download, out)
  coco = {
    entry["image_id"]: str(entry["coco_id"])
    for entry, _ in json_stream.entries(image_data, {"image_id": int, "coco_id": object})
  }
  entries, images = out.entries("vg.json", "images"), vg_images(download, out.folder)
  texts = left_out = 0
  for entry, where in json_stream.entries(regions, {"id": int, "regions": list}):
    number = entry["id"]
    if number not in coco:
      raise ValueError(f"{where}: image id {number} is not in {image_data}; get both files again.")
    for region in entry["regions"]:
      json_stream.check(region, {"phrase": str}, f"{where}, regions")
    phrases = list(
      dict.fromkeys(phrase for region in entry["regions"] if (phrase := region["phrase"].strip()))
    )
    if coco[number] in evaluated:
      left_out += 1
    elif phrases and (image := images(f"{number}.jpg")):
      entries.add({"image": image, "caption": phrases, "image_id": f"vg_{number}"})
      texts += len(phrases)
  images.finish(out)
  out.note(
    f"{texts:,} different descriptions of these images; {left_out:,} images of COCO's val and "
    f"test splits were left out"
  )
  _command(out, "vg")


def _command(out, name):
  """The command that trains on the set `name` and on those that were written to the same folder before."""
  sets = [
    one
    for one in ("coco_train", "vg", "cc", "sbu")
    if one == name or os.path.isfile(os.path.join(out.folder, f"{one}.json"))
  ]
  if "coco_train" not in sets:
    out.note(
      "pre-training is evaluated on COCO, whose files coco_captions writes; give it the same --out"
    )
  out.command(
    "pretrain",
    "base",
    "data=files",
    f"root={out.folder}",
    f"sets={'/'.join(sets)}",
    "clip=CLIP",
    "bert=BERT",
    mode="train",
  )


def _evaluated(download, out):
  """COCO ids, as text, of Karpathy's val and test images."""
  path = download.find(_KARPATHY)
  if path is None:
    out.note(
      "dataset_coco.json of caption_datasets.zip is not there, so images of COCO's val and test "
      "splits were kept"
    )
    return frozenset()
  entries = json_stream.entries(path, {"cocoid": int, "split": str}, "images")
  return {str(entry["cocoid"]) for entry, _ in entries if entry["split"] in ("val", "test")}


def cc(download, out):
  """Conceptual Captions, such images of it as were downloaded."""
  names = ("Train_GCC-training.tsv", "Train-GCC-training.tsv")
  _web(
    download,
    out,
    "cc",
    lambda: _tsv(*download.require(Wanted("the training captions of Conceptual Captions", names))),
  )


def sbu(download, out):
  """SBU captions, such images of it as were downloaded."""
  names = [f"SBU_captioned_photo_dataset_{part}.txt" for part in ("captions", "urls")]
  wanted = [
    Wanted(
      "the captions of SBU, SBUCaptionedPhotoDataset.tar.gz unpacked",
      (name, f"dataset/{name}", f"sbu/{name}"),
    )
    for name in names
  ]
  _web(download, out, "sbu", lambda: _two_files(*download.require(*wanted)))


def _web(download, out, name, pairs):
  """Writes NAME.json.

  Pairs: function that gives (caption, address) pairs, in case the images are called like their
  addresses.
  """
  entries = out.entries(f"{name}.json", "captions")
  folders = [
    folder
    for folder in (f"{name}/images", f"{name}_images", "images", name)
    if os.path.isdir(download.path(folder))
  ]
  if not folders:
    raise FileNotFoundError(
      f"{download.root} has no folder {name}/images or images; put the downloaded images there."
    )
  shards = sorted(glob.glob(os.path.join(glob.escape(download.path(folders[0])), "*.parquet")))
  images = Images(
    download,
    f"the images of {name} that were to be downloaded",
    folders,
    out.folder,
    skip_missing=True,
  )
  for caption, image in _shards(shards) if shards else _by_address(pairs()):
    if caption.strip() and (found := images(image)):
      entries.add({"image": found, "caption": caption.strip()})
  images.finish(out)
  _command(out, name)


def _shards(paths):
  """(caption, image) of what img2dataset left: 00000.parquet beside the folder 00000 or 00000.tar.

  Raises ValueError.
  """
  for path in paths:
    shard = os.path.basename(path).removesuffix(".parquet")
    top = f"{shard}.tar" if os.path.isfile(f"{path.removesuffix('.parquet')}.tar") else shard
    columns, rows = tabular.open_table(path, {"caption", "key", "status"})
    if lacking := {"caption", "key", "status"} - set(columns):
      raise ValueError(
        f"{path} has no column {', '.join(sorted(lacking))}; run img2dataset with --caption_col, "
        f"so that it has."
      )
    for row, _ in rows:
      if row["status"] == "success" and row["caption"]:
        yield row["caption"], f"{top}/{row['key']}.jpg"


def _by_address(pairs):
  """(caption, image) of images that are called like the last part of their address, where that is the only one called so."""
  pairs = [
    (caption, posixpath.basename(urllib.parse.urlsplit(address).path)) for caption, address in pairs
  ]
  times = {}
  for _, name in pairs:
    times[name] = times.get(name, 0) + 1
  return ((caption, name) for caption, name in pairs if name and times[name] == 1)


def _tsv(path):
  """(caption, address) of lines with a tab between them. Raises ValueError."""
  for number, line in enumerate(tabular.lines(path), 1):
    caption, tab, address = line.rstrip("\r\n").partition("\t")
    if not tab:
      raise ValueError(
        f"{path}, line {number}: must be a caption, a tab and the address of its image."
      )
    yield caption, address


def _two_files(captions, addresses):
  """(caption, address) of two files that go line by line together.

  Raises ValueError: one has more lines.
  """
  one, other = tabular.lines(captions), tabular.lines(addresses)
  for caption in one:
    if (address := next(other, None)) is None:
      break
    yield caption.rstrip("\r\n"), address.strip()
  else:
    if next(other, None) is None:
      return
  raise ValueError(
    f"{captions} and {addresses} must have a line for each other, and one of them has more; get "
    f"both again."
  )
