"""Visual Genome, Conceptual Captions and SBU: the JSON files of configs/pretrain.py."""

import glob
import os
import posixpath
import urllib.parse
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from mplug_jax.data.prepare import json_stream
from mplug_jax.data.prepare.dataset import Dataset
from mplug_jax.data.prepare.download import Download, Images, Wanted, zipped
from mplug_jax.data.prepare.writer import Output
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


def vg_images(download: Download, image_root: str) -> Images:
  """Returns the finder of Visual Genome's images, which come in two parts.

  Args:
    download: the downloaded files.
    image_root: the folder in which the config looks for them.
  """
  folders = ("VG_100K", "VG_100K_2", "images.zip/VG_100K", "images2.zip/VG_100K_2")
  return Images(
    download,
    "the images of Visual Genome, parts 1 and 2",
    [top + name for name in folders for top in ("vg/", "")],
    image_root,
  )


def visual_genome(download: Download, out: Output) -> None:
  """Writes the region descriptions, without images that COCO captioning is evaluated on.

  Args:
    download: the downloaded files.
    out: where the file is written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  regions, image_data = download.require(_REGIONS, _IMAGE_DATA)
  evaluated = _evaluated(download, out)
  types = {"image_id": int, "coco_id": object}
  coco = {
    entry["image_id"]: str(entry["coco_id"]) for entry, _ in json_stream.entries(image_data, types)
  }
  entries = out.entries("vg.json", "images")
  images = vg_images(download, out.folder)
  texts = 0
  left_out = 0
  undescribed = 0
  for entry, location in json_stream.entries(regions, {"id": int, "regions": list}):
    number = entry["id"]
    if number not in coco:
      raise ValueError(
        f"{location}: image id {number} is not in {image_data}; get both files again."
      )
    for region in entry["regions"]:
      json_stream.check(region, {"phrase": str}, f"{location}, regions")
    phrases = [phrase for region in entry["regions"] if (phrase := region["phrase"].strip())]
    phrases = list(dict.fromkeys(phrases))
    if coco[number] in evaluated:
      left_out += 1
    elif not phrases:
      undescribed += 1
    elif image := images(f"{number}.jpg"):
      entries.add({"image": image, "caption": phrases, "image_id": f"vg_{number}"})
      texts += len(phrases)
  images.finish(out)
  out.note(
    f"{texts:,} different descriptions of these images; {left_out:,} images of COCO's val and "
    "test splits were left out"
  )
  if undescribed:
    out.note(f"{undescribed:,} images without a description were left out")
  _command(out, "vg")


def _command(out: Output, name: str) -> None:
  """Prints the command that trains on this set and on those in the same folder."""
  sets = [
    other
    for other in ("coco_train", "vg", "cc", "sbu")
    if other == name or os.path.isfile(os.path.join(out.folder, f"{other}.json"))
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


def _evaluated(download: Download, out: Output) -> Container[str]:
  """Returns the COCO ids, as text, of Karpathy's val and test images."""
  path = download.find(_KARPATHY)
  if path is None:
    out.note(
      "dataset_coco.json of caption_datasets.zip is missing, so images of COCO's val and test "
      "splits were kept"
    )
    return frozenset()
  entries = json_stream.entries(path, {"cocoid": int, "split": str}, "images")
  return {str(entry["cocoid"]) for entry, _ in entries if entry["split"] in ("val", "test")}


Pairs = Iterable[tuple[str, str]]


def cc(download: Download, out: Output) -> None:
  """Writes those pairs of Conceptual Captions whose images were downloaded.

  Args:
    download: the downloaded files.
    out: where the file is written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  names = ("Train_GCC-training.tsv", "Train-GCC-training.tsv")
  wanted = Wanted("the training captions of Conceptual Captions", names)
  _web(download, out, "cc", lambda: _tsv(*download.require(wanted)))


def sbu(download: Download, out: Output) -> None:
  """Writes those pairs of SBU whose images were downloaded.

  Args:
    download: the downloaded files.
    out: where the file is written.

  Raises:
    ValueError, OSError: a file is missing or malformed.
  """
  names = [f"SBU_captioned_photo_dataset_{part}.txt" for part in ("captions", "urls")]
  wanted = [
    Wanted(
      "the captions of SBU, SBUCaptionedPhotoDataset.tar.gz unpacked",
      (name, f"dataset/{name}", f"sbu/{name}"),
    )
    for name in names
  ]
  _web(download, out, "sbu", lambda: _two_files(*download.require(*wanted)))


def _web(download: Download, out: Output, name: str, read: Callable[[], Pairs]) -> None:
  """Writes NAME.json.

  Args:
    download: the downloaded files.
    out: where the file is written.
    name: the data set.
    read: reads (caption, address) pairs, used if the images are named after their addresses.
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
  tables = sorted(glob.glob(os.path.join(glob.escape(download.path(folders[0])), "*.parquet")))
  images = Images(
    download,
    f"the images of {name} that were to be downloaded",
    folders,
    out.folder,
    skip_missing=True,
  )
  left_out: Counter[str] = Counter()
  for caption, file in _shards(tables, left_out) if tables else _by_address(read(), left_out):
    if not caption.strip():
      left_out["pairs without a caption"] += 1
    elif image := images(file):
      entries.add({"image": image, "caption": caption.strip()})
  images.finish(out)
  for kind, count in left_out.items():
    out.note(f"{count:,} {kind} were left out")
  _command(out, name)


def _shards(paths: Sequence[str], left_out: Counter[str]) -> Iterator[tuple[str, str]]:
  """Yields (caption, image) of what img2dataset wrote, and counts the rest; raises ValueError.

  00000.parquet is beside the folder 00000 or 00000.tar.
  """
  for path in paths:
    shard = os.path.basename(path).removesuffix(".parquet")
    top = f"{shard}.tar" if os.path.isfile(f"{path.removesuffix('.parquet')}.tar") else shard
    columns, rows = tabular.open_table(path, {"caption", "key", "status"})
    if missing := {"caption", "key", "status"} - set(columns):
      raise ValueError(
        f"{path} has no column {', '.join(sorted(missing))}; run img2dataset again with "
        "--caption_col."
      )
    for row, _ in rows:
      if row["status"] == "success":
        yield row["caption"] or "", f"{top}/{row['key']}.jpg"
      else:
        left_out["images that img2dataset could not download"] += 1


def _by_address(pairs: Pairs, left_out: Counter[str]) -> Iterator[tuple[str, str]]:
  """Yields (caption, image) of images named after the last part of their address, if unique.

  Others are counted.
  """
  named = [
    (caption, posixpath.basename(urllib.parse.urlsplit(address).path)) for caption, address in pairs
  ]
  counts = Counter(name for _, name in named)
  for caption, name in named:
    if name and counts[name] == 1:
      yield caption, name
    else:
      left_out["pairs whose address ends like another or with no name"] += 1


def _tsv(path: str) -> Iterator[tuple[str, str]]:
  """Yields (caption, address) of lines with a tab between them; raises ValueError."""
  for number, line in enumerate(tabular.lines(path), 1):
    caption, tab, address = line.rstrip("\r\n").partition("\t")
    if not tab:
      raise ValueError(
        f"{path}, line {number}: must be a caption, a tab and the address of its image."
      )
    yield caption, address


def _two_files(captions: str, addresses: str) -> Iterator[tuple[str, str]]:
  """Yields (caption, address) of two files with corresponding lines.

  Raises ValueError if one has more lines.
  """
  remaining = tabular.lines(addresses)
  for caption in tabular.lines(captions):
    if (address := next(remaining, None)) is None:
      break
    yield caption.rstrip("\r\n"), address.strip()
  else:
    if next(remaining, None) is None:
      return
  raise ValueError(
    f"{captions} and {addresses} must have corresponding lines, but one of them has more; get both "
    "again."
  )


VISUAL_GENOME = Dataset(
  "Visual Genome's region descriptions for pre-training, without COCO's evaluation images.",
  visual_genome,
)
CC = Dataset("Conceptual Captions for pre-training, those with a downloaded image.", cc)
SBU = Dataset("SBU captions for pre-training, those with a downloaded image.", sbu)
