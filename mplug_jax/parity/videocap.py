"""Video captioning: frames are encoded one by one and read in a row.

Captions and searches go on from a prompt.
"""

from mplug_jax.parity import beams, caption


def checks(r):
  """Recording -> [(name, function -> Rows)]."""
  case = caption.Case(r, "in/video", _encode, r["in/prompt_ids"], r.meta["prompt_length"])
  return [("forward and gradients", case.forward), *beams.checks(r, case)]


def _encode(m, video):
  """f32[B, frames, S, S, 3] -> outputs by recorded name; "memory" f32[B, frames * N, D] is what the decoder reads."""
  frames = video.reshape((-1,) + video.shape[2:])
  embeds = m.encode_image(frames)
  clips = embeds.reshape(video.shape[0], -1, embeds.shape[-1])
  return {
    "visual": m.visual_encoder(frames),
    "frame_embeds": embeds,
    "video_embeds": clips,
    "memory": clips,
  }
