"""Images with captions in a folder, without annotation files.

The captions of a.jpg are the lines of a.txt beside it.
"""

import os
from collections.abc import Iterator

from mplug_jax.data.images.suffixes import IMAGE_SUFFIXES
from mplug_jax.data.storage import tabular


def images(root: str, split: str) -> Iterator[tuple[str, list[str], str]]:
  """Finds the images in the folder `split` of `root` and its subfolders.

  Args:
    root: config.data.image_root.
    split: "train", "val" or "test".

  Yields:
    (name below `root`; its captions, the stripped lines that are not blank; its path for messages),
    in alphabetical order.

  Raises:
    ValueError: no root, a caption file that is not UTF-8, or no image at all.
    FileNotFoundError: the folder does not exist.
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
  empty = True
  for folder, subfolders, names in os.walk(top):
    subfolders.sort()  # os.walk continues in this order
    for name in sorted(names):
      if name.lower().endswith(IMAGE_SUFFIXES):
        empty = False
        path = os.path.join(folder, name)
        text = os.path.splitext(path)[0] + ".txt"
        captions = [line.strip() for line in tabular.lines(text)] if os.path.isfile(text) else []
        yield os.path.relpath(path, root), [caption for caption in captions if caption], path
  if empty:
    raise ValueError(f"{top} holds no image whose name ends with {', '.join(IMAGE_SUFFIXES)}.")
