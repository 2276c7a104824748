"""Generated scenes and clips as sources of images with captions."""

import numpy as np
from jaxtyping import Int

from mplug_jax.data.sources import scenes as scene_sources
from mplug_jax.scenes import oracle, parser, scene
from mplug_jax.scenes import text as scene_text


class SceneCaptions(scene_sources.SceneCaptions):
  """Generated scenes as a source of images.

  Images of group "unseen" show a (shape, color) pair that training never shows, those of group
  "seen" do not.
  """

  def counts(self) -> Int[np.ndarray, "images"]:
    """Returns the number of captions of every image."""
    return np.full(len(self), self._captions, np.int64)

  def group(self, index: int) -> str:
    """Returns "seen" or "unseen"."""
    return "unseen" if scene.scene(self.config, self.split, index).unseen else "seen"

  def another_caption(self, index: int) -> str:
    """Returns one more caption from the same templates, as a perfect model of them would."""
    return scene_text.captions(scene.scene(self.config, self.split, index), self._captions + 1)[-1]

  def is_true(self, index: int, text: str) -> bool:
    """Returns whether a caption has the wording of scenes and is certainly true of an image.

    Args:
      index: the image.
      text: the caption.
    """
    form = parser.parse(text)
    if form is None:
      return False
    return oracle.holds(form, scene.scene(self.config, self.split, index)) is True


class ClipCaptions(scene_sources.SceneClips):
  """Rendered clips as a source of "images", with groups as in SceneCaptions."""

  def counts(self) -> Int[np.ndarray, "images"]:
    """Returns the number of captions of every clip."""
    return np.array([len(self.captions(i)) for i in range(len(self))], np.int64)

  def group(self, index: int) -> str:
    """Returns "seen" or "unseen"."""
    return "unseen" if self.shows_unseen(index) else "seen"
