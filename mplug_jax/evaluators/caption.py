"""Evaluation of captioning: one caption per image of a split, scored against its references."""

import os
from typing import Any

import numpy as np
from absl import logging

from mplug_jax.data.examples import caption as caption_lib
from mplug_jax.data.sources import caption
from mplug_jax.evaluators import common
from mplug_jax.evaluators.common import Predict
from mplug_jax.metrics import captioning
from mplug_jax.reporting import sample_sheet
from mplug_jax.runtime.atomic_files import write_json

_METRICS = (*captioning.DEFAULT, "METEOR", "SPICE")


class CaptionEvaluator:
  """Captions all images of a split and scores the captions; writes them and a sample sheet."""

  metric = "CIDEr-D"  # Printed last, and decides which checkpoint is best.

  def __init__(self, config: Any, tokenizer: Any, workdir: str):
    """Opens the split.

    Args:
      config: config of the run.
      tokenizer: tokenizer of the run.
      workdir: folder to write results to.
    """
    self.config = config
    self.tokenizer = tokenizer
    self.workdir = workdir
    self.source = caption.images(config.data, config.eval.split)
    self.transform = caption_lib.make_transform(config, tokenizer, train=False)
    self._prompt = caption_lib.prompt(config, tokenizer)
    self.samples: list[str] = []  # Sample predictions of the last run.
    if isinstance(self.source, caption.CaptionRecords):
      self._warn_of_empty_references()

  def _warn_of_empty_references(self):
    """Logs, before training, how many reference captions have no text."""
    count = min(self.config.eval.limit or len(self.source), len(self.source))
    given = {i: texts for i in range(count) if (texts := self.source.captions(i))}
    _, notes = captioning.without_empty(given, lambda i: self.source[i]["image_id"])
    for sentence in notes:
      logging.warning("%s split: %s", self.config.eval.split, sentence)

  def run(
    self, predict: Predict, process_index: int = 0, process_count: int = 1
  ) -> dict[str, float]:
    """Evaluates.

    Args:
      predict: {"generate": function of a batch of this process}; it returns {name: array with the
        rows of all processes}, which include "index", "mask" and "corrupt" of the batch.
      process_index: number of this process.
      process_count: number of processes.

    Returns:
      {name: value}, scores x 100 as papers report them, of the images with references; captions
      without a word are no references:
        BLEU-1 to BLEU-4, ROUGE-L, CIDEr-D of all images; METEOR and SPICE where available.
        CIDEr-D_<group>: of the images of each group separately, as the NoCaps server; groups are
          its domains, or scenes with and without unseen (shape, color) pairs.
        shuffled_CIDEr-D: every caption against the references of the next image, a lower bound.
        another_caption_CIDEr-D (scenes), also by group: one more caption from the templates of the
          references, which describes the image in a random choice of words.
        true (scenes), also by group: percent of captions that follow a template and are true of
          the image; shuffled_true: the same for the captions of the next image.
        corrupt_images, if any: number of unreadable images; their captions count.
    """
    captions = {}
    corrupt = 0
    for index, out, unreadable in common.rows(
      self.config, self.source, self.transform, predict["generate"], process_index, process_count
    ):
      text = self.tokenizer.decode(out["tokens"][: out["length"]])
      captions[index] = text.removeprefix(self._prompt.decoded).strip()
      corrupt += unreadable
    given = {index: self.source.captions(index) for index in captions}
    if not any(given.values()):
      given = {}  # a split without references
    truth, notes = captioning.without_empty(
      dict(zip(given, _tokenize(given.values()))), lambda i: self.source[i]["image_id"]
    )
    references = {i: [text for text in given[i] if text.strip()] for i in truth}
    self.samples = [
      captions[i] + (f"   (reference: {references[i][0]})" if i in references else "")
      for i in common.spread(list(captions))
    ]
    if process_index == 0:
      rows = [
        {"image_id": self.source[index]["image_id"], "caption": text}
        for index, text in captions.items()
      ]
      write_json(os.path.join(self.workdir, "predictions.json"), rows)
      self._write_sheet(captions, references)
    result: dict[str, Any] = self._scores(captions, truth) if truth else {}
    self.samples += notes + self._cider_notes(truth)
    # A string says why a metric was not computed.
    self.samples += [f"{name}: {value}" for name, value in result.items() if isinstance(value, str)]
    result = {name: value for name, value in result.items() if not isinstance(value, str)}
    return result | ({"corrupt_images": float(corrupt)} if corrupt else {})

  def _scores(self, captions, truth):
    """Returns the scores of `run`; captions and tokens of references by record number."""
    order = list(truth)
    predicted = dict(zip(order, _tokenize([[captions[i]] for i in order])))
    groups = self._groups(order)
    result = captioning.evaluate_tokens(predicted, truth, _METRICS)
    result |= {
      f"{self.metric}{name}": self._score(predicted, truth, members)
      for name, members in sorted(groups.items())
      if name
    }
    following = dict(zip(order, order[1:] + order[:1]))
    result[f"shuffled_{self.metric}"] = self._score(
      {i: predicted[following[i]] for i in order}, truth, order
    )
    if isinstance(self.source, caption.SceneCaptions):
      true = {i: self.source.is_true(i, captions[i]) for i in order}
      result |= {
        f"true{name}": 100 * float(np.mean([true[i] for i in members]))
        for name, members in sorted(groups.items())
      }
      result["shuffled_true"] = 100 * float(
        np.mean([self.source.is_true(i, captions[following[i]]) for i in order])
      )
      others = dict(zip(order, _tokenize([[self.source.another_caption(i)] for i in order])))
      result |= {
        f"another_caption_{self.metric}{name}": self._score(others, truth, members)
        for name, members in sorted(groups.items())
      }
    return result

  def _groups(self, order):
    """Returns {"": all record numbers, "_<group>": those of the group}."""
    groups = {"": order}
    for index in order:
      if name := self.source.group(index):
        groups.setdefault(f"_{name}", []).append(index)
    return groups

  def _cider_notes(self, truth):
    """Returns sentences on groups of images whose CIDEr-D says nothing."""
    notes = []
    for name, members in self._groups(list(truth)).items():
      if members and (note := captioning.cider_note({i: truth[i] for i in members})):
        notes.append(f"{self.metric}{name}: {note}")
    return notes

  def _score(self, captions, references, members):
    """Returns CIDEr-D of a subset of the images, scored as a separate set."""
    captions, references = ({i: texts[i] for i in members} for texts in (captions, references))
    return captioning.evaluate_tokens(captions, references, (self.metric,))[self.metric]

  def _write_sheet(self, captions, references):
    """Writes predictions.png: the first images with caption and reference; scenes with verdict."""

    def sample(index, text):
      verdict = "open"
      if isinstance(self.source, caption.SceneCaptions):
        verdict = "right" if self.source.is_true(index, text) else "wrong"
      return sample_sheet.Sample("", text, references.get(index, [""])[0], verdict)

    entries = (
      (self.source[index]["image"], [sample(index, text)]) for index, text in captions.items()
    )
    common.write_sheet(
      os.path.join(self.workdir, "predictions.png"),
      entries,
      self.config.model.image_size,
      self.config.data.frames,
    )


def _tokenize(groups):
  """Tokenizes groups of captions, [[caption, ...], ...]."""
  tokens = iter(captioning.tokenize([text for group in groups for text in group]))
  return [[next(tokens) for _ in group] for group in groups]
