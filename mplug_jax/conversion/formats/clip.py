"""OpenAI's CLIP and open_clip, whose tensor names are those of mPLUG's image encoder.

Names and shapes do not show the activation: CLIP models of open_clip trained with plain GELU look
like OpenAI's, but our image encoder computes OpenAI's x * sigmoid(1.702 x), so the converted model
computes something else.
"""

from mplug_jax.conversion.formats import mplug

FORMAT = mplug.FORMAT._replace(
  name="clip",
  title="OpenAI's CLIP or open_clip (visual...)",
  sign=r"visual\.",
  prefix="visual_encoder.",
  renames=(),
)
