"""Images in folders: the one search for them, and images with captions without annotation files.

The captions of a.jpg are the lines of a.txt beside it.
"""

import os
from collections import Counter
from collections.abc import Container, Iterator
from typing import NamedTuple

from mplug_jax.data.errors import note
from mplug_jax.data.images.suffixes import IMAGE_SUFFIXES
from mplug_jax.data.storage import tabular

_LISTED = 5  # suffixes that a note names


class FolderFiles(NamedTuple):
  """The files in a folder and its subfolders.

  Attributes:
    folder: the folder.
    paths: images, in alphabetical order of their folders and names.
    hidden: files whose name, or that of a subfolder, begins with a dot; macOS writes such files
      beside each image, ._a.jpg beside a.jpg.
    others: files without a suffix of IMAGE_SUFFIXES.
    links: links to folders, which are not followed.
  """

  folder: str
  paths: list[str]
  hidden: list[str]
  others: list[str]
  links: list[str]

  def skipped(self, used: Container[str] = ()) -> str:
    """Says how many files are skipped.

    Args:
      used: paths of other files that the caller uses.

    Returns:
      One sentence, or "" if there are none.
    """
    others = [path for path in self.others if path not in used]
    parts: list[str] = []
    if others:
      suffixes = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in others)
      listed = ", ".join(f"{suffix} {count}" for suffix, count in suffixes.most_common(_LISTED))
      more = ", ..." if len(suffixes) > _LISTED else ""
      parts.append(
        f"{len(others)} without the suffix of an image ({listed}{more}; the first is {others[0]})"
      )
    if self.hidden:
      parts.append(f"{len(self.hidden)} hidden (the first is {self.hidden[0]})")
    if self.links:
      parts.append(f"{len(self.links)} links to folders (the first is {self.links[0]})")
    return f"{self.folder}: files are skipped, {' and '.join(parts)}." if parts else ""


def find_images(folder: str) -> FolderFiles:
  """Finds the images in a folder and its subfolders, by their suffixes.

  Args:
    folder: the folder.

  Returns:
    The images and all other files.

  Raises:
    OSError: a folder cannot be read.
  """
  files = FolderFiles(folder, [], [], [], [])
  for parent, subfolders, names in os.walk(folder, onerror=_raise):
    subfolders.sort()  # os.walk continues in this order
    paths = (os.path.join(parent, name) for name in subfolders)
    files.links.extend(filter(os.path.islink, paths))
    inner = os.path.relpath(parent, folder)
    in_hidden = any(part.startswith(".") for part in inner.split(os.sep) if part != ".")
    for name in sorted(names):
      path = os.path.join(parent, name)
      if in_hidden or name.startswith("."):
        files.hidden.append(path)
      elif name.lower().endswith(IMAGE_SUFFIXES):
        files.paths.append(path)
      else:
        files.others.append(path)
  return files


def _raise(error: OSError) -> None:
  raise error


def images(root: str, split: str) -> Iterator[tuple[str, list[str], str]]:
  """Finds the images in the folder `split` of `root` and its subfolders.

  What is skipped is noted after the last image.

  Args:
    root: config.data.image_root.
    split: "train", "val" or "test".

  Yields:
    (name below `root`; its captions, the stripped lines that are not blank; its path for messages),
    in alphabetical order.

  Raises:
    ValueError: no root, a caption file that is not UTF-8, or no image at all.
    FileNotFoundError: the folder does not exist.
    OSError: a folder cannot be read.
  """
  if not root:
    raise ValueError(
      "data.image_root is not set; source folder reads its folders train, val and test."
    )
  top = os.path.join(root, split)
  if not os.path.isdir(top):
    raise FileNotFoundError(
      f"{top} does not exist or is not a folder; source folder reads the images of split "
      f"{split!r} there."
    )
  files = find_images(top)
  texts: dict[str, str] = {}  # path without suffix -> caption file
  for path in files.others:
    stem, suffix = os.path.splitext(path)
    if suffix.lower() == ".txt":
      texts.setdefault(stem, path)
  used: set[str] = set()
  for path in files.paths:
    text = texts.get(os.path.splitext(path)[0])
    captions = [line.strip() for line in tabular.lines(text)] if text else []
    if text:
      used.add(text)
    yield os.path.relpath(path, root), [caption for caption in captions if caption], path
  skipped = files.skipped(used)
  if not files.paths:
    raise ValueError(
      " ".join(
        filter(
          None,
          (f"{top} holds no image whose name ends with {', '.join(IMAGE_SUFFIXES)}.", skipped),
        )
      )
    )
  if skipped:
    note(skipped)
