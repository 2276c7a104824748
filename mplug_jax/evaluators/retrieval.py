"""Evaluation of image-text retrieval in both directions, by similarity and after re-ranking."""

import functools
import os
from typing import Any

import numpy as np
from absl import logging

from mplug_jax.data import pipeline
from mplug_jax.data.examples import retrieval as data
from mplug_jax.data.sources import caption
from mplug_jax.data.text import cleaning
from mplug_jax.evaluators import common, reranking
from mplug_jax.evaluators.common import Predict
from mplug_jax.metrics import captioning, recall
from mplug_jax.reporting import sample_sheet
from mplug_jax.runtime import atomic_files
from mplug_jax.scenes import oracle as scene_oracle

LISTED = 10  # Candidates of a query in the results file.


class RetrievalEvaluator:
  """Ranks texts for images and images for texts; writes the best ones and a sample sheet.

  config.eval.limit restricts images to the first ones and texts to theirs, an easier task. Captions
  without a word are no texts; an image without texts is no query, but one of the images to find.
  """

  metric = "r_mean"  # Printed last, and decides which checkpoint is best.

  def __init__(self, config: Any, tokenizer: Any, workdir: str):
    """Opens the split.

    Args:
      config: config of the run.
      tokenizer: tokenizer of the run.
      workdir: folder to write results to.

    Raises:
      ValueError: there is no caption with a word, if the source reads annotation files.
    """
    self.config = config
    self.workdir = workdir
    self.source = data.get_images(config.data, config.eval.split)
    self.transform = data.make_transform(config, tokenizer, train=False)
    self._rows = data.caption_rows(config, tokenizer)
    self._count = min(config.eval.limit or len(self.source), len(self.source))
    self.samples: list[str] = []  # Sample predictions of the last run.
    self._notes: list[str] = []
    if isinstance(self.source, caption.CaptionRecords):
      self._texts  # noqa: B018 - before training

  @functools.cached_property
  def _texts(self):
    """Captions of all images, [T], and the number of the image of each, i64[T]."""
    most = self.config.data.max_words
    captions = {
      i: [
        text if cleaning.pre_caption(text, most).strip() else "" for text in self.source.captions(i)
      ]
      for i in range(self._count)
    }
    kept, self._notes = captioning.without_empty(captions, lambda i: self.source[i]["image_id"])
    for sentence in self._notes:
      logging.warning("%s split: %s", self.config.eval.split, sentence)
    if not kept:
      raise ValueError(
        f"Split {self.config.eval.split!r} has no caption with a word, and retrieval needs texts."
      )
    owner = np.repeat(list(kept), [len(texts) for texts in kept.values()])
    return [text for texts in kept.values() for text in texts], owner

  def run(
    self, predict: Predict, process_index: int = 0, process_count: int = 1
  ) -> dict[str, float]:
    """Evaluates.

    Args:
      predict: "embed_image", "embed_texts", "image_memory" and "rerank" of RetrievalTask, see
        training.build.Build.predict.
      process_index: number of this process; all processes make the same calls and get the same
        result.
      process_count: number of processes.

    Returns:
      {name: percent}: recalls of the final order, see recall.recalls; with prefix `similarity_`,
      those before re-ranking; chance_r_mean; r_mean_<group> of groups of images (of scenes, with
      and without unseen (shape, color) pairs); of scenes with prefix `attainable_`, an oracle's.
      Counts: pairs_scored, pairs_shared by both directions, images_encoded for re-ranking, and
      corrupt_images if any.
    """
    texts, owner = self._texts
    numbers = np.arange(self._count)
    images, corrupt = self._embed_images(predict["embed_image"], process_index, process_count)
    bank = predict["embed_texts"](
      {"caption": self._token_rows(texts, process_index, process_count)}, keep=True
    )
    features = np.asarray(bank["feature"])[: len(texts)]
    k = self.config.task.rerank_k
    kept = k or LISTED  # without re-ranking, as many as the results file lists
    candidates = (
      reranking.nearest(images, features, kept, numbers, owner),
      reranking.nearest(features, images, kept, owner, numbers),
    )
    result = {"chance_r_mean": recall.chance(owner, self._count)}
    described = np.bincount(owner, minlength=self._count) > 0
    if k:
      by_image, by_text = (side.rank for side in candidates)
      result |= {
        f"similarity_{name}": value
        for name, value in recall.recalls(by_image[described], by_text).items()
      }
      candidates, counts = self._rerank(predict, candidates, bank, process_index, process_count)
      result |= counts
    ranks = [side.rank for side in candidates]
    result |= recall.recalls(ranks[0][described], ranks[1])
    result |= self._groups(owner, ranks) | self._attainable()
    self.samples = [
      f"{texts[t]} -> its image is number {ranks[1][t] + 1:.0f}"
      for t in common.spread(list(range(len(texts))))
    ] + self._notes
    if process_index == 0:
      self._write_results(*candidates)
      self._write_sheet(candidates[1])
    return result | ({"corrupt_images": corrupt} if corrupt else {})

  def _embed_images(self, fn, process_index, process_count):
    """Returns features f32[N, E] and the number of unreadable images."""
    rows = [
      (out["feature"], unreadable)
      for _, out, unreadable in common.rows(
        self.config, self.source, self.transform, fn, process_index, process_count
      )
    ]
    features, corrupt = zip(*rows)
    return np.stack(features), sum(corrupt)

  def _token_rows(self, texts, process_index, process_count):
    """Returns this process's rows of tokens, i32[rows, L]; empty texts fill the last batch."""
    size = self.config.eval.batch_size
    padded = texts + [""] * (-len(texts) % size)
    share = len(padded) // process_count
    return np.stack([self._rows(text) for text in padded[process_index * share :][:share]])

  def _rerank(self, predict, candidates, bank, process_index, process_count):
    """Re-ranks the candidates of both directions; returns them and {name: count}."""
    by_image, by_text = candidates
    table = reranking.PairTable(by_image.ids, by_text.ids)
    count = self.config.eval.batch_size // process_count
    rows = slice(process_index * count, (process_index + 1) * count)

    def score(memory, texts):
      return predict["rerank"](
        {"pair_text": texts[rows].astype(np.int32)}, kept={"memory": memory, "texts": bank}
      )["score"]

    blocks = self._blocks(predict["image_memory"], table.order(), process_index, process_count)
    scores = reranking.score_pairs(table, blocks, score, self.config.task.rerank_texts)
    numbers = np.arange(self._count)
    owner = self._texts[1]
    of_images = scores[table.positions(numbers[:, None], by_image.ids)]
    of_texts = scores[table.positions(by_text.ids, np.arange(len(owner))[:, None])]
    counts = {
      "pairs_scored": len(table),
      "pairs_shared": table.wanted - len(table),
      "images_encoded": self._count,
    }
    return (
      reranking.rerank(by_image, of_images, numbers, owner),
      reranking.rerank(by_text, of_texts, owner, numbers),
    ), counts

  def _blocks(self, fn, order, process_index, process_count):
    """Yields image numbers i64[G] of a block, -1 for padding, and their memory, in order."""
    size = self.config.eval.batch_size
    batches = pipeline.eval_batches(
      _Reordered(self.source, order),
      self.transform,
      batch_size=size,
      process_index=process_index,
      process_count=process_count,
      threads=self.config.loader.threads,
    )
    try:
      for start, batch in zip(range(0, len(order), size), batches):
        numbers = order[start : start + size]
        yield np.pad(numbers, (0, size - len(numbers)), constant_values=-1), fn(batch, keep=True)
    finally:
      batches.close()

  # ---- results

  def _groups(self, owner, ranks):
    """Returns {"r_mean_<group>": percent} of each group of images, ranked among all images."""
    described = set(owner.tolist())
    groups = [self.source.group(i) if i in described else None for i in range(self._count)]
    out = {}
    for name in sorted({group for group in groups if group is not None}):
      chosen = np.array([group == name for group in groups])
      out[f"r_mean_{name}"] = recall.recalls(ranks[0][chosen], ranks[1][chosen[owner]])["r_mean"]
    return out

  def _attainable(self):
    """Returns recalls of an oracle that has the true captions of each image; {} without scenes."""
    if not isinstance(self.source, caption.SceneCaptions):
      return {}
    captions = int(self.source.counts()[0])
    oracle = scene_oracle.retrieval(
      scene_oracle.consistency(self.source.config, self.source.split, self._count, captions)
    )
    out = {
      f"attainable_{side}_r{depth}": oracle[f"{name}_r{depth}"]
      for side, name in (("txt", "image_to_text"), ("img", "text_to_image"))
      for depth in recall.DEPTHS
    }
    return out | {"attainable_r_mean": float(np.mean(list(out.values())))}

  @functools.cached_property
  def _image_ids(self):
    return [self.source[i]["image_id"] for i in range(self._count)]

  def _write_results(self, by_image, by_text):
    """Writes predictions.json: the best texts of each image, the best images of each text."""
    texts, owner = self._texts
    ids = self._image_ids
    listed = [
      [
        (list(map(int, row)), [round(float(s), 6) for s in scores])
        for row, scores in zip(x.ids[:, :LISTED], x.scores[:, :LISTED])
      ]
      for x in (by_image, by_text)
    ]
    atomic_files.write_json(
      os.path.join(self.workdir, "predictions.json"),
      {
        "images": [
          {
            "image_id": ids[i],
            "texts": numbers,
            "captions": [texts[t] for t in numbers],
            "scores": scores,
          }
          for i, (numbers, scores) in enumerate(listed[0])
        ],
        "texts": [
          {
            "text": t,
            "caption": texts[t],
            "image_id": ids[owner[t]],
            "images": [ids[i] for i in numbers],
            "scores": scores,
          }
          for t, (numbers, scores) in enumerate(listed[1])
        ],
      },
    )

  def _write_sheet(self, by_text):
    """Writes predictions.png: some texts, each with the best image."""
    texts, owner = self._texts

    def entries():
      for t in common.spread(list(range(len(texts))), common.SHEET_IMAGES):
        image = int(by_text.ids[t, 0])
        right = image == owner[t]
        yield (
          self.source[image]["image"],
          [
            sample_sheet.Sample(
              texts[t],
              f"found {self._image_ids[image]}",
              str(self._image_ids[owner[t]]),
              "right" if right else "wrong",
            )
          ],
        )

    common.write_sheet(
      os.path.join(self.workdir, "predictions.png"),
      entries(),
      self.config.model.image_size,
      self.config.data.frames,
    )


class _Reordered:
  """Source with selected records of another source, in a given order."""

  def __init__(self, source, order):
    self._source = source
    self._order = order

  def __len__(self):
    return len(self._order)

  def __getitem__(self, index):
    return self._source[int(self._order[index])]
