"""Masked language modeling: draws the hidden tokens (paper section 3.3, as in BERT)."""

import numpy as np
from jaxtyping import Int, Int32

_MASKED = 0.8  # share of the chosen tokens that become [MASK]
_RANDOM = 0.1  # share that becomes a random token; the rest is unchanged


def mask_tokens(
  row: Int32[np.ndarray, " tokens"],
  words: Int[np.ndarray, " tokens"],
  rng: np.random.Generator,
  *,
  probability: float,
  whole_words: bool,
  vocab_size: int,
  mask_id: int,
  pad_id: int,
) -> tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]:
  """Hides tokens of one text.

  Args:
    row: token ids.
    words: number of the word that a token belongs to, -1 for [bos] and padding.
    rng: source of all randomness.
    probability: of a token to be chosen, or of a word with `whole_words`.
    whole_words: chooses the parts of a word together.
    vocab_size: number of tokens to draw from.
    mask_id: id of [MASK].
    pad_id: id of [PAD].

  Returns:
    Token ids that the model reads: 80% of the chosen tokens are the mask, 10% any token of the
    vocabulary, 10% themselves; and the chosen tokens, pad_id elsewhere.
  """
  units = words if whole_words else np.where(words >= 0, np.arange(len(row)), -1)
  draws = rng.random(len(row))
  chosen = (units >= 0) & (draws[np.maximum(units, 0)] < probability)
  kinds = rng.random(len(row))
  random_ids = rng.integers(0, vocab_size, len(row))
  read = np.where(kinds < _MASKED, mask_id, np.where(kinds < _MASKED + _RANDOM, random_ids, row))
  hidden = np.where(chosen, read, row).astype(np.int32)
  return hidden, np.where(chosen, row, pad_id).astype(np.int32)
