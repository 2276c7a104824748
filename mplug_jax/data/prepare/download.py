"""Downloaded annotation files and images in one folder, loose or in their zip files."""

import os
import posixpath
from collections.abc import Iterable
from typing import NamedTuple

from mplug_jax.data.prepare.writer import Output
from mplug_jax.data.storage import archives


class Wanted(NamedTuple):
  """A file of a download.

  Attributes:
    title: the official download that it belongs to, in words.
    names: its possible names below the root, any of which is used; a name may lead into a zip.
  """

  title: str
  names: tuple[str, ...]


def zipped(
  name: str, title: str, *archive_names: str, folders: Iterable[str] = ("",), inner: str = ""
) -> Wanted:
  """Describes a file that may be loose or in a zip file.

  Args:
    name: name of the file.
    title: the official download that it belongs to, in words.
    *archive_names: names of the zip files that may contain it.
    folders: folders below the root in which it, or the zip file, may be.
    inner: folder in the zip file.

  Returns:
    The Wanted of the file; loose files come first.
  """
  folders = tuple(folders)
  loose = [posixpath.join(folder, name) for folder in folders]
  packed = [
    posixpath.join(folder, archive, inner, name) for folder in folders for archive in archive_names
  ]
  return Wanted(title, (*loose, *packed))


class Download:
  """The folder of --root.

  Attributes:
    root: the folder.
    skip_missing: drop annotations of missing images instead of raising an error.
  """

  def __init__(self, root: str, skip_missing: bool = False):
    """Raises FileNotFoundError if the folder does not exist."""
    if not os.path.isdir(root):
      raise FileNotFoundError(
        f"{root} does not exist or is not a folder; --root must be the folder of the downloaded "
        "files."
      )
    self.root = root
    self.skip_missing = skip_missing

  def path(self, name: str) -> str:
    """Returns the path of a name below the root."""
    return os.path.join(self.root, name)

  def find(self, wanted: Wanted) -> str | None:
    """Finds a file of the download.

    Args:
      wanted: the file.

    Returns:
      Its path, or None.

    Raises:
      ValueError: an archive cannot be used.
    """
    paths = map(self.path, wanted.names)
    return next(filter(archives.is_file, paths), None)

  def require(self, *wanted: Wanted) -> list[str]:
    """Finds files that the data set needs.

    Args:
      *wanted: the files.

    Returns:
      Their paths.

    Raises:
      FileNotFoundError: names all missing files.
      ValueError: an archive cannot be used.
    """
    paths: list[str] = []
    missing: list[str] = []
    for file in wanted:
      path = self.find(file)
      if path is None:
        missing.append(f"{' or '.join(file.names)} ({file.title})")
      else:
        paths.append(path)
    if missing:
      raise FileNotFoundError(f"{self.root} lacks {'; and '.join(missing)}.")
    return paths

  def all_or_none(self, *wanted: Wanted) -> list[str] | None:
    """Finds files that belong together.

    Args:
      *wanted: the files.

    Returns:
      Their paths, or None if none exists.

    Raises:
      FileNotFoundError, ValueError: as in `require`, if some of them exist.
    """
    return self.require(*wanted) if any(map(self.find, wanted)) else None


class Images:
  """Finds images, or clips, and returns the names by which annotations refer to them.

  Attributes:
    folder: folder of the last image that was found.
  """

  def __init__(
    self,
    download: Download,
    title: str,
    folders: Iterable[str],
    image_root: str,
    skip_missing: bool | None = None,
  ):
    """Makes a finder.

    Args:
      download: the download.
      title: the official download that the images belong to, in words.
      folders: folders below the root in which they may be; a name may lead into a zip.
      image_root: the folder in which the config looks for them. Names are relative to it; images
        outside it are named by their full path.
      skip_missing: drop missing images; None: as the download says.
    """
    self._download = download
    self._title = title
    self._names = tuple(folders)
    self._skip = download.skip_missing if skip_missing is None else skip_missing
    self._folders = [download.path(folder) for folder in self._names]
    self._base = os.path.join(os.path.abspath(image_root), "")
    # Folder -> names in it: a million look-ups take minutes on a network disk.
    self._listed: dict[str, set[str]] = {}
    self._missing: dict[str, None] = {}  # names in order of appearance
    self.folder = ""

  def __call__(self, name: str) -> str | None:
    """Returns the name of an image for the config; None if it is missing.

    Args:
      name: its name in the folders.

    Raises:
      FileNotFoundError: the first image is missing, and missing images may not be dropped.
    """
    folder = self._folder_of(name)
    if folder is not None:
      self.folder = folder
      self._folders.remove(folder)
      self._folders.insert(0, folder)  # the next image is probably in the same folder
      return self.relative(os.path.join(folder, name))
    self._missing[name] = None
    if not self.folder and not self._skip:
      folders = " or ".join(folder or "." for folder in self._names)
      raise FileNotFoundError(
        f"{self._download.root}: {name} is not in {folders} ({self._title}); complete the "
        "download, or pass --skip_missing to drop annotations of missing images."
      )
    return None

  def has(self, name: str) -> bool:
    """Returns whether an image exists, without counting it as missing."""
    return self._folder_of(name) is not None

  def relative(self, path: str) -> str:
    """Returns a path as the config needs it."""
    path = os.path.abspath(path)
    return path[len(self._base) :] if path.startswith(self._base) else path

  def finish(self, out: Output) -> None:
    """Notes how many images are missing.

    Args:
      out: takes the note.

    Raises:
      FileNotFoundError: all are missing, or some without --skip_missing.
    """
    if not self._missing:
      return
    example = next(iter(self._missing))
    problem = f"{len(self._missing):,} of {self._title} are missing, for instance {example}"
    if not (self.folder and self._skip):
      advice = ", or pass --skip_missing to drop annotations of missing images"
      raise FileNotFoundError(
        f"{self._download.root}: {problem}; complete the download{advice if self.folder else ''}."
      )
    out.note(f"{problem}; their annotations were dropped")

  def _folder_of(self, name: str) -> str | None:
    """Returns the folder of an image, or None."""
    for folder in self._folders:
      if self._exists(os.path.join(folder, name)):
        return folder
    return None

  def _exists(self, path: str) -> bool:
    if archives.split(path) is not None:
      return archives.is_file(path)
    folder, name = os.path.split(path)
    if folder not in self._listed:
      try:
        self._listed[folder] = set(os.listdir(folder))
      except (FileNotFoundError, NotADirectoryError):
        self._listed[folder] = set()
    return name in self._listed[folder]
