"""The description of a data set that tools.prepare_data can prepare: a row of prepare.DATASETS."""

import dataclasses
from collections.abc import Callable

from mplug_jax.data.prepare.download import Download
from mplug_jax.data.prepare.writer import Output


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Preparation of one data set.

  Attributes:
    summary: one sentence for the help of the command.
    write: reads a Download and writes the annotation files to an Output; takes the keyword
      `split_by` if the data set has several splits.
    own_folder: whether the files are written to a folder named after the data set by default,
      because another data set of the same download has files of the same names.
    split_by: authors of the splits that --split_by chooses from.
  """

  summary: str
  write: Callable[..., None]
  own_folder: bool = False
  split_by: tuple[str, ...] = ()

  def run(self, download: Download, out: Output, split_by: str = "") -> None:
    """Reads the download and writes the annotation files.

    Args:
      download: the downloaded files.
      out: where the files are written.
      split_by: one of the attribute `split_by`; "": the default of the data set.
    """
    if self.split_by:
      self.write(download, out, split_by=split_by)
    else:
      self.write(download, out)
