"""Data sets as they are distributed -> the annotation files that the configs read. Imports no JAX, runs nothing that a file holds."""

import os

from mplug_jax.data_prepare import captions, clips, pretraining, questions, referring, statements
from mplug_jax.data_prepare.download import Download
from mplug_jax.data_prepare.output import writing

RECIPES = {  # name -> function (Download, Output); that of the sets of the REFER tool takes name and split_by as well
  "vqa_v2": questions.vqa_v2,
  "gqa": questions.gqa,
  "coco_captions": captions.coco_captions,
  "flickr30k": captions.flickr30k,
  "nocaps": captions.nocaps,
  "visual_genome": pretraining.visual_genome,
  "cc": pretraining.cc,
  "sbu": pretraining.sbu,
  "refcoco": referring.refcoco,
  "refcoco+": referring.refcoco,
  "refcocog": referring.refcoco,
  "nlvr2": statements.nlvr2,
  "snli_ve": statements.snli_ve,
  "msrvtt": clips.msrvtt,
  "msrvtt_qa": clips.msrvtt_qa,
  "msvd_qa": clips.msvd_qa,
  "vatex": clips.vatex,
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
    options: name (a key of RECIPES), root, out ("": root, or a folder called `name` in it where several sets share a download),
      overwrite, skip_missing, split_by.

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
      f"{folder} has a comma in its name, behind which the argument of a config ends; rename it, or name another as --out."
    )
  with writing(folder, options.overwrite) as out:
    recipe = RECIPES[options.name]
    recipe(
      download, out, *((options.name, options.split_by) if recipe is referring.refcoco else ())
    )
  return out.lines
