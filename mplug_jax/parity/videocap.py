"""Video captioning: frames are encoded one by one and read in sequence.

Captions and searches continue a prompt.
"""

from jaxtyping import Array, Float

from mplug_jax.models.mplug import MPlug
from mplug_jax.parity import beams, caption
from mplug_jax.parity.recording import Recording
from mplug_jax.parity.rows import Check


def checks(r: Recording) -> list[Check]:
  """Returns the checks of a recording.

  Args:
    r: recorded file.
  """
  case = caption.Case(r, "in/video", _encode, r["in/prompt_ids"], r.meta["prompt_length"])
  return [("forward and gradients", case.forward), *beams.checks(r, case)]


def _encode(m: MPlug, video: Float[Array, "batch frames size size 3"]) -> dict[str, Array]:
  """Returns outputs by recorded name, see `caption.encode`; memory is f32[B, frames * N, D]."""
  frames = video.reshape((-1,) + video.shape[2:])
  embeds = m.encode_image(frames)
  clips = embeds.reshape(video.shape[0], -1, embeds.shape[-1])
  return {
    "visual": m.visual_encoder(frames),
    "frame_embeds": embeds,
    "video_embeds": clips,
    "memory": clips,
  }
