"""Builds the model of a config."""

from typing import Any

import jax.numpy as jnp

from mplug_jax.models.mplug import MPlug


def build_model(config: Any, tokenizer: Any) -> MPlug:
  """Returns the model of config.model.

  Args:
    config: resolved config.
    tokenizer: its vocabulary size and pad id become the model's.

  Raises:
    ValueError: the model's vocabulary is not the tokenizer's.
  """
  fields = config.model.to_dict()
  fields["vocab_size"] = fields["vocab_size"] or tokenizer.vocab_size
  if fields["vocab_size"] != tokenizer.vocab_size:
    raise ValueError(
      f"config.model.vocab_size={fields['vocab_size']} but the tokenizer has "
      f"{tokenizer.vocab_size} tokens; set it to 0 to follow the tokenizer, or give the vocabulary "
      "that the model was made for in config.tokenizer.path."
    )
  return MPlug(**fields | {"dtype": jnp.dtype(fields["dtype"]), "pad_id": tokenizer.pad_id})
