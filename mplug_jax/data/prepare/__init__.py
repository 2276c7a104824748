"""Data sets as they are distributed -> the annotation files that the configs read.

Imports no JAX, runs nothing that a file holds.
"""

import os

from mplug_jax.data.prepare import captions, nlvr2_snli_ve, pretrain, refcoco, video, vqa
from mplug_jax.data.prepare.download import Download
from mplug_jax.data.prepare.writer import writing

# name -> function (Download, Output); that of the sets of the REFER tool takes name and split_by as
# well
RECIPES = {
  "vqa_v2": vqa.vqa_v2,
  "gqa": vqa.gqa,
  "coco_captions": captions.coco_captions,
  "flickr30k": captions.flickr30k,
  "nocaps": captions.nocaps,
  "visual_genome": pretrain.visual_genome,
  "cc": pretrain.cc,
  "sbu": pretrain.sbu,
  "refcoco": refcoco.refcoco,
  "refcoco+": refcoco.refcoco,
  "refcocog": refcoco.refcoco,
  "nlvr2": nlvr2_snli_ve.nlvr2,
  "snli_ve": nlvr2_snli_ve.snli_ve,
  "msrvtt": video.msrvtt,
  "msrvtt_qa": video.msrvtt_qa,
  "msvd_qa": video.msvd_qa,
  "vatex": video.vatex,
}
_OWN_FOLDER = (
  "refcoco",
  "refcoco+",
  "refcocog",
  "msrvtt_qa",
)  # their files are called like those of another set of the same download


def prepare(options):
  """Reads a download and writes what the config reads.

  Args:
    options: name (a key of RECIPES), root, out ("": root, or a folder called `name` in it where
      several sets share a download), overwrite, skip_missing, split_by.

  Returns:
    lines to print: what was written, notes, the commands that read it.

  Raises:
    ValueError, OSError: one sentence; nothing was written.
  """
  download = Download(options.root, options.skip_missing)
  folder = options.out or (
    os.path.join(options.root, options.name) if options.name in _OWN_FOLDER else options.root
  )
  if "," in folder:
    raise ValueError(
      f"{folder} has a comma in its name, behind which the argument of a config ends; rename it, "
      f"or name another as --out."
    )
  with writing(folder, options.overwrite) as out:
    recipe = RECIPES[options.name]
    recipe(download, out, *((options.name, options.split_by) if recipe is refcoco.refcoco else ()))
  return out.lines
