"""Builds the model of a config."""

import jax.numpy as jnp

from mplug_jax.models.mplug import MPlug


def build_model(config, tokenizer):
  """config.model -> MPlug.

  Raises:
    ValueError: the model's vocabulary is not the tokenizer's.
  """
  fields = config.model.to_dict()
  fields["vocab_size"] = fields["vocab_size"] or tokenizer.vocab_size
  if fields["vocab_size"] != tokenizer.vocab_size:
    raise ValueError(
      f"config.model.vocab_size={fields['vocab_size']} but the tokenizer has {tokenizer.vocab_size} tokens; set it "
      "to 0 to follow the tokenizer, or give the vocabulary that the model was made for in config.tokenizer.path."
    )
  return MPlug(**fields | {"dtype": jnp.dtype(fields["dtype"]), "pad_id": tokenizer.pad_id})
