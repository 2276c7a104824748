"""Masked language modelling: which tokens are hidden, and what stands in their place (paper section 3.3, as in BERT)."""

import numpy as np

_MASKED, _RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay as they are


def mask_tokens(row, words, rng, *, probability, whole_words, vocab_size, mask_id, pad_id):
  """Hides tokens of one text.

  Args:
    row: i32[L], token ids. words: i32[L], number of the word that a token belongs to, -1 for [bos]
      and padding.
    rng: numpy Generator. probability: of a token, or of a word with `whole_words`, to be chosen.

  Returns:
    (i32[L] what the model reads: of the chosen tokens 80% are the mask, 10% any token of the
    vocabulary, 10% themselves; i32[L] the chosen tokens, pad_id elsewhere). With whole_words the
    parts of a word are chosen together.
  """
  units = words if whole_words else np.where(words >= 0, np.arange(len(row)), -1)
  draws = rng.random(len(row))
  chosen = (units >= 0) & (draws[np.maximum(units, 0)] < probability)
  how, random_ids = rng.random(len(row)), rng.integers(0, vocab_size, len(row))
  read = np.where(how < _MASKED, mask_id, np.where(how < _MASKED + _RANDOM, random_ids, row))
  return np.where(chosen, read, row).astype(np.int32), np.where(chosen, row, pad_id).astype(
    np.int32
  )
