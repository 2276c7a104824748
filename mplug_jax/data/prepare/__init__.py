"""Data sets as they are distributed, converted to the annotation files that the configs read.

Imports no JAX, and executes nothing that a file contains.
"""

import os

from mplug_jax.data.prepare import captions, nlvr2_snli_ve, pretrain, refcoco, video, vqa
from mplug_jax.data.prepare.dataset import Dataset
from mplug_jax.data.prepare.download import Download
from mplug_jax.data.prepare.writer import writing

# Name of the command -> data set. The command line and docs/data.md list the same names.
DATASETS: dict[str, Dataset] = {
  "vqa_v2": vqa.VQA_V2,
  "gqa": vqa.GQA,
  "coco_captions": captions.COCO_CAPTIONS,
  "flickr30k": captions.FLICKR30K,
  "nocaps": captions.NOCAPS,
  "visual_genome": pretrain.VISUAL_GENOME,
  "cc": pretrain.CC,
  "sbu": pretrain.SBU,
  "refcoco": refcoco.REFCOCO,
  "refcoco+": refcoco.REFCOCO_PLUS,
  "refcocog": refcoco.REFCOCOG,
  "nlvr2": nlvr2_snli_ve.NLVR2,
  "snli_ve": nlvr2_snli_ve.SNLI_VE,
  "msrvtt": video.MSRVTT,
  "msrvtt_qa": video.MSRVTT_QA,
  "msvd_qa": video.MSVD_QA,
  "vatex": video.VATEX,
}


def prepare(
  name: str,
  root: str,
  out: str = "",
  overwrite: bool = False,
  skip_missing: bool = False,
  split_by: str = "",
) -> list[str]:
  """Reads a download and writes the files that the config reads: all of them, or none.

  Args:
    name: a key of DATASETS.
    root: folder of the downloaded files.
    out: folder of the written files; "": `root`, or its subfolder `name` if several data sets of
      one download have files of the same names.
    overwrite: replace existing files.
    skip_missing: drop annotations of missing images.
    split_by: author of the splits, for data sets that have several; "": the default.

  Returns:
    Lines to print: the files written, notes, and the commands that read them.

  Raises:
    ValueError, OSError: nothing was written; the message is one sentence.
  """
  dataset = DATASETS[name]
  download = Download(root, skip_missing)
  folder = out or (os.path.join(root, name) if dataset.own_folder else root)
  if "," in folder:
    raise ValueError(
      f"{folder} has a comma in its name, which ends an argument of a config; rename it, or choose "
      "another folder with --out."
    )
  with writing(folder, overwrite) as output:
    dataset.run(download, output, split_by)
  return output.lines
