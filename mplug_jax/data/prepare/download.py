"""What was downloaded: annotation files and images under one folder, loose or in the zip files that they come in."""

import os
import posixpath
from typing import NamedTuple

from mplug_jax.data.storage import archives


class Wanted(NamedTuple):
  """A file of a download.

  What: the official download that it belongs to, in words. names: where it may be below the root,
  of which any
  will do; a name may lead into a zip.
  """

  what: str
  names: tuple


def zipped(name, what, *archive, folders=("",), inner=""):
  """The Wanted of a file that may lie in `folders` of the root, or, there, at `inner` in zip files called `archive`."""
  loose = [posixpath.join(folder, name) for folder in folders]
  return Wanted(
    what,
    (
      *loose,
      *(posixpath.join(folder, zip_, inner, name) for folder in folders for zip_ in archive),
    ),
  )


class Download:
  """The folder of --root.

  Args:
    root: the folder.
    skip_missing: leave out what is said about images that are not there, instead of refusing.

  Raises:
    FileNotFoundError: there is no such folder.
  """

  def __init__(self, root, skip_missing=False):
    if not os.path.isdir(root):
      raise FileNotFoundError(
        f"{root} does not exist or is not a folder; --root names the folder of what was downloaded."
      )
    self.root, self.skip_missing = root, skip_missing

  def path(self, name):
    """A name below the root -> path."""
    return os.path.join(self.root, name)

  def find(self, wanted):
    """The path of a Wanted, or None. Raises ValueError for an archive that cannot be used."""
    return next(
      (self.path(name) for name in wanted.names if archives.is_file(self.path(name))), None
    )

  def require(self, *wanted):
    """The paths of all of `wanted`. Raises FileNotFoundError that names all that are missing."""
    paths = [self.find(one) for one in wanted]
    missing = [
      f"{' or '.join(one.names)} ({one.what})" for one, path in zip(wanted, paths) if path is None
    ]
    if missing:
      raise FileNotFoundError(f"{self.root} lacks {'; and '.join(missing)}.")
    return paths

  def all_or_none(self, *wanted):
    """`require`, or None if not one of `wanted` is there."""
    return self.require(*wanted) if any(map(self.find, wanted)) else None


class Images:
  """Finds images, or clips, and says how annotations name them.

  Args:
    download: the Download.
    what: the official download they belong to, in words.
    folders: where they may be below the root; a name may lead into a zip.
    image_root: where the config looks for them. They are named relative to it, or by their whole
      path if they lie elsewhere.
    skip_missing: leave out those that are missing; None: as the download says.

  Attributes:
    folder: where the last one was.
  """

  def __init__(self, download, what, folders, image_root, skip_missing=None):
    self._download, self._what, self._names = download, what, tuple(folders)
    self._skip = download.skip_missing if skip_missing is None else skip_missing
    self._folders = [download.path(folder) for folder in folders]
    self._base = os.path.join(os.path.abspath(image_root), "")
    # folder -> the names in it: a look-up for each of a million images takes minutes on a network
    # disk
    self._listed = {}
    self._missing, self.folder = {}, ""  # names in order of appearance

  def __call__(self, name):
    """The name of an image for the config; None if it is missing.

    Raises:
      FileNotFoundError: the first one is missing, and missing ones may not be left out.
    """
    folder = self._folder_of(name)
    if folder is not None:
      self.folder = folder
      self._folders.remove(folder)
      self._folders.insert(0, folder)  # the next one is likely to be there as well
      return self.relative(os.path.join(folder, name))
    self._missing[name] = None
    if not self.folder and not self._skip:
      places = " or ".join(folder or "." for folder in self._names)
      raise FileNotFoundError(
        f"{self._download.root}: {name} is not in {places} ({self._what}); complete the download "
        f"or, if others are "
        "there, leave out what is said of this one with --skip_missing."
      )
    return None

  def has(self, name):
    """Whether an image is there; it is not counted."""
    return self._folder_of(name) is not None

  def relative(self, path):
    """A path as the config needs it."""
    path = os.path.abspath(path)
    return path[len(self._base) :] if path.startswith(self._base) else path

  def finish(self, out):
    """Says how many are missing.

    Raises FileNotFoundError: some are, and --skip_missing was not given; or all are.
    """
    if not self._missing:
      return
    problem = (
      f"{len(self._missing):,} of {self._what} are missing, for instance "
      f"{next(iter(self._missing))}"
    )
    if not (self.folder and self._skip):
      raise FileNotFoundError(
        f"{self._download.root}: {problem}; complete the download"
        f"{', or leave out what is said of them with --skip_missing' if self.folder else ''}."
      )
    out.note(f"{problem}; what is said of them was left out")

  def _folder_of(self, name):
    return next(
      (folder for folder in self._folders if self._there(os.path.join(folder, name))), None
    )

  def _there(self, path):
    if archives.split(path) is not None:
      return archives.is_file(path)
    folder, name = os.path.split(path)
    if folder not in self._listed:
      try:
        self._listed[folder] = set(os.listdir(folder))
      except (FileNotFoundError, NotADirectoryError):
        self._listed[folder] = frozenset()
    return name in self._listed[folder]
