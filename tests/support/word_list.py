"""Word lists of BERT's form."""

from mplug_jax.data.text import tokenizer_base


def text(*words):
  """Content of a vocab.txt with the special tokens and these words."""
  return "\n".join([*tokenizer_base.SPECIAL_TOKENS, *words]) + "\n"
