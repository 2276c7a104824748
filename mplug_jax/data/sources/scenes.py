"""Procedural scenes as records of every task but VQA, each made when it is requested.

scenes/scene.py describes the images.
"""

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mplug_jax.data.sources.source import Record
from mplug_jax.scenes import clips, pairs, rendering, text
from mplug_jax.scenes import scene as scenes


def scene_config(data: Mapping[str, Any]) -> scenes.SceneConfig:
  """Returns the SceneConfig of config.data (size, seed, difficulty)."""
  return scenes.SceneConfig(data["size"], data["seed"], data["difficulty"])


class _SceneRecords(abc.ABC):
  """Random access to the records of one split.

  Attributes:
    config: the SceneConfig.
    split: "train", "val" or "test".
  """

  def __init__(self, config: scenes.SceneConfig, split: str, limit: int = 0):
    """Makes the source.

    Args:
      config: the SceneConfig.
      split: "train", "val" or "test".
      limit: number of records; 0: all of the split.
    """
    self.config = config
    self.split = split
    self._size = min(limit or scenes.split_size(split), scenes.split_size(split))

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < self._size:
      raise IndexError(f"record {index} is not among the {self._size} of split {self.split!r}")
    return self._record(int(index))

  @abc.abstractmethod
  def _record(self, index: int) -> Record:
    """Makes a record."""

  def _image(self, scene: scenes.Scene) -> UInt8[np.ndarray, "height width 3"]:
    return rendering.render(scene, self.config)


class SceneCaptions(_SceneRecords):
  """Scenes with captions.

  A record is {"image": u8[H, W, 3], "image_id": str, "captions": [str, ...], "unseen": whether the
  image shows a held-out (shape, color) pair}.
  """

  def __init__(self, config: scenes.SceneConfig, split: str, limit: int = 0, captions: int = 5):
    """Makes the source; `captions` is the number of captions of an image."""
    super().__init__(config, split, limit)
    self._captions = captions

  def _record(self, index: int) -> Record:
    scene = scenes.scene(self.config, self.split, index)
    return {
      "image": self._image(scene),
      "image_id": f"{self.split}-{index}",
      "unseen": scene.unseen,
      "captions": self.captions(index),
    }

  def captions(self, index: int) -> list[str]:
    """Returns the captions of a record, without its pixels."""
    return text.captions(scenes.scene(self.config, self.split, index), self._captions)


class SceneExpressions(_SceneRecords):
  """Scenes with referring expressions.

  A record is {"image", "image_id", "expressions": [{"text", "box": (x1, y1, x2, y2) in pixels with
  exclusive ends, "needs_relation", "unseen"}, ...]}.
  """

  def __init__(self, config: scenes.SceneConfig, split: str, limit: int = 0, expressions: int = 2):
    """Makes the source; `expressions` is the number of expressions of an image."""
    super().__init__(config, split, limit)
    self._expressions = expressions

  def _record(self, index: int) -> Record:
    scene = scenes.scene(self.config, self.split, index)
    return {
      "image": self._image(scene),
      "image_id": f"{self.split}-{index}",
      "expressions": self.expressions(index),
    }

  def expressions(self, index: int) -> list[Record]:
    """Returns the expressions of a record, without its pixels."""
    expressions = text.referring(scenes.scene(self.config, self.split, index), self._expressions)
    keys = ("text", "box", "needs_relation", "unseen")
    return [{key: expression[key] for key in keys} for expression in expressions]


class ScenePairs(_SceneRecords):
  """Statements about two scenes.

  A record is {"images": [left, right], "id", "sentence", "label": bool, "template": int, "unseen"}.
  """

  def _record(self, index: int) -> Record:
    pair = pairs.pair(self.config, self.split, index)
    return {
      "images": [self._image(pair.left), self._image(pair.right)],
      "id": f"{self.split}-{index}",
      "sentence": pair.text,
      "label": pair.label,
      "template": pair.template,
      "unseen": pair.unseen,
    }

  def sentence(self, index: int) -> str:
    """Returns the statement of a record, without its pixels."""
    return pairs.pair(self.config, self.split, index).text


class SceneEntailment(_SceneRecords):
  """Hypotheses about a scene.

  A record is {"image", "id", "sentence", "label": one of scenes.pairs.LABELS, "unseen"}.
  """

  def _record(self, index: int) -> Record:
    entailment = pairs.entailment(self.config, self.split, index)
    return {
      "image": self._image(entailment.premise),
      "id": f"{self.split}-{index}",
      "sentence": entailment.text,
      "label": entailment.label,
      "unseen": entailment.unseen,
    }

  def sentence(self, index: int) -> str:
    """Returns the hypothesis of a record, without its pixels."""
    return pairs.entailment(self.config, self.split, index).text


class SceneClips(_SceneRecords):
  """Clips as records of captioning and of VQA.

  A record is {"image": u8[T, H, W, 3], "image_id", "captions": [str, ...], "questions": [...]}.
  """

  def __init__(self, config: scenes.SceneConfig, split: str, limit: int = 0, frames: int = 8):
    """Makes the source; `frames` is the number of frames of a clip."""
    super().__init__(config, split, limit)
    self._frames = frames

  def _record(self, index: int) -> Record:
    clip = self._clip(index)
    return {
      "image": clips.render_clip(clip, self.config),
      "image_id": f"{self.split}-{index}",
      "captions": [caption.text for caption in clip.captions],
      "questions": self._questions(clip, index),
    }

  def _clip(self, index: int) -> clips.Clip:
    return clips.clip(self.config, self.split, index, self._frames)

  def _questions(self, clip: clips.Clip, index: int) -> list[Record]:
    return [
      {
        "question_id": f"{self.split}-{index}-{i}",
        "question": question.text,
        "answers": [question.answer],
        "weights": [1.0],
        "ocr": "",
        "objects": "",
        "dataset": "clips",
        "family": question.family,
        "unseen": question.unseen,
      }
      for i, question in enumerate(clip.questions)
    ]

  def captions(self, index: int) -> list[str]:
    """Returns the captions of a record, without its pixels."""
    return [caption.text for caption in self._clip(index).captions]

  def questions(self, index: int) -> list[Record]:
    """Returns the questions of a record, without its pixels."""
    return self._questions(self._clip(index), index)

  def shows_unseen(self, index: int) -> bool:
    """Returns whether a clip shows a held-out (shape, color) pair."""
    return self._clip(index).frames[0].unseen
