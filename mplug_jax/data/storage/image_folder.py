"""Images with captions in a folder, without any annotation file: beside a.jpg lies a.txt, with a caption on every line."""

import os
from collections.abc import Iterator

from mplug_jax.data.images.suffixes import IMAGE_SUFFIXES
from mplug_jax.data.storage import tabular


def images(root, split) -> Iterator[tuple[str, list[str], str]]:
  """The images under the folder `split` of `root`, in alphabetical order.

  Folders in it are read too.

  Yields:
    (name below `root`, its captions: the lines that are not blank, without white space around; path
    for messages).

  Raises:
    ValueError: no root, a file of captions that is not UTF-8, no image at all. FileNotFoundError:
      there is no such folder.
  """
  if not root:
    raise ValueError(
      "data.image_root is not set; source folder reads its folders train, val and test."
    )
  top, found = os.path.join(root, split), False
  if not os.path.isdir(top):
    raise FileNotFoundError(
      f"{top} does not exist or is not a folder; source folder reads the images of split "
      f"{split!r} there."
    )
  for folder, inner, names in os.walk(top):
    inner.sort()  # os.walk goes on in this order
    for name in sorted(names):
      if name.lower().endswith(IMAGE_SUFFIXES):
        found, path = True, os.path.join(folder, name)
        text = os.path.splitext(path)[0] + ".txt"
        captions = [line.strip() for line in tabular.lines(text)] if os.path.isfile(text) else []
        yield os.path.relpath(path, root), [caption for caption in captions if caption], path
  if not found:
    raise ValueError(f"{top} holds no image whose name ends with {', '.join(IMAGE_SUFFIXES)}.")
