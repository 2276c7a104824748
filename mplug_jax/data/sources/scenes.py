"""Procedural scenes as the records of every task but VQA, each made when asked for.

See scenes.py for what they show.
"""

from mplug_jax.scenes import clips, pairs, rendering, text
from mplug_jax.scenes import scene as scenes


def scene_config(data):
  """config.data (size, seed, difficulty) -> SceneConfig."""
  return scenes.SceneConfig(data.size, data.seed, data.difficulty)


class _SceneRecords:
  """Random access to the records of one split."""

  def __init__(self, config, split, limit=0):
    """config: SceneConfig. limit: only the first so many records; 0: all."""
    self.config, self.split = config, split
    self._size = min(limit or scenes.split_size(split), scenes.split_size(split))

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    if not 0 <= index < self._size:
      raise IndexError(f"record {index} is not among the {self._size} of split {self.split!r}")
    return self._record(int(index))

  def _image(self, scene):
    return rendering.render(scene, self.config)


class SceneCaptions(_SceneRecords):
  """{"image": u8[H, W, 3], "image_id", "captions": [str, ...], "unseen": the image shows a held-out (shape, colour) pair}."""

  def __init__(self, config, split, limit=0, captions=5):
    super().__init__(config, split, limit)
    self._captions = captions

  def _record(self, index):
    scene = scenes.scene(self.config, self.split, index)
    return {
      "image": self._image(scene),
      "image_id": f"{self.split}-{index}",
      "unseen": scene.unseen,
      "captions": self.captions(index),
    }

  def captions(self, index):
    """The texts of a record, without its pixels."""
    return text.captions(scenes.scene(self.config, self.split, index), self._captions)


class SceneExpressions(_SceneRecords):
  """{"image", "image_id", "expressions": [{"text", "box": (x1, y1, x2, y2) pixels, ends exclusive, "needs_relation", "unseen"}, ...]}."""

  def __init__(self, config, split, limit=0, expressions=2):
    super().__init__(config, split, limit)
    self._expressions = expressions

  def _record(self, index):
    scene = scenes.scene(self.config, self.split, index)
    return {
      "image": self._image(scene),
      "image_id": f"{self.split}-{index}",
      "expressions": self.expressions(index),
    }

  def expressions(self, index):
    """The expressions of a record, without its pixels."""
    found = text.referring(scenes.scene(self.config, self.split, index), self._expressions)
    return [{name: e[name] for name in ("text", "box", "needs_relation", "unseen")} for e in found]


class ScenePairs(_SceneRecords):
  """{"images": [left, right], "id", "sentence", "label": bool, "template": int, "unseen"}: statements about two images."""

  def _record(self, index):
    pair = pairs.pair(self.config, self.split, index)
    return {
      "images": [self._image(pair.left), self._image(pair.right)],
      "id": f"{self.split}-{index}",
      "sentence": pair.text,
      "label": pair.label,
      "template": pair.template,
      "unseen": pair.unseen,
    }

  def sentence(self, index):
    """The text of a record, without its pixels."""
    return pairs.pair(self.config, self.split, index).text


class SceneEntailment(_SceneRecords):
  """{"image", "id", "sentence", "label": name of scene_pairs.LABELS, "unseen"}: hypotheses about an image."""

  def _record(self, index):
    found = pairs.entailment(self.config, self.split, index)
    return {
      "image": self._image(found.premise),
      "id": f"{self.split}-{index}",
      "sentence": found.text,
      "label": found.label,
      "unseen": found.unseen,
    }

  def sentence(self, index):
    """The text of a record, without its pixels."""
    return pairs.entailment(self.config, self.split, index).text


class SceneClips(_SceneRecords):
  """Clips as records of captioning and of VQA: {"image": u8[T, H, W, 3], "image_id", "captions": [str, ...], "questions": [...]}."""

  def __init__(self, config, split, limit=0, frames=8):
    super().__init__(config, split, limit)
    self._frames = frames

  def _record(self, index):
    clip = self._clip(index)
    return {
      "image": clips.render_clip(clip, self.config),
      "image_id": f"{self.split}-{index}",
      "captions": [caption.text for caption in clip.captions],
      "questions": self._questions(clip, index),
    }

  def _clip(self, index):
    return clips.clip(self.config, self.split, index, self._frames)

  def _questions(self, clip, index):
    return [
      {
        "question_id": f"{self.split}-{index}-{i}",
        "question": q.text,
        "answers": [q.answer],
        "weights": [1.0],
        "ocr": "",
        "objects": "",
        "dataset": "clips",
        "family": q.family,
        "unseen": q.unseen,
      }
      for i, q in enumerate(clip.questions)
    ]

  def captions(self, index):
    """The texts of a record, without its pixels."""
    return [caption.text for caption in self._clip(index).captions]

  def questions(self, index):
    """The questions of a record, without its pixels."""
    return self._questions(self._clip(index), index)

  def shows_unseen(self, index):
    """Whether a held-out (shape, colour) pair is to be seen."""
    return self._clip(index).frames[0].unseen
