"""Foreign checkpoint formats, one module each; the first is the official model's."""

from mplug_jax.conversion.formats import bert, clip, huggingface_clip, mplug

FORMATS = [mplug.FORMAT, clip.FORMAT, huggingface_clip.FORMAT, bert.FORMAT]
