"""A tokenizer with nothing but numbers, for programs that are compiled where there is no vocabulary."""


class StandInTokenizer:
  """As many tokens as `vocab_size` says, the special ones first.

  A word is some token, always the same. See tokenizer.py.
  """

  pad_id, unk_id, bos_id, eos_id, mask_id = range(5)

  def __init__(self, vocab_size):
    self.vocab_size, self._names = vocab_size, {}

  def token_id(self, name):
    """Every name has a number of its own, while there are any."""
    return self._names.setdefault(name, 5 + len(self._names) % (self.vocab_size - 5))

  def encode(self, text):
    """[bos] and a token for every word."""
    return [self.bos_id, *map(self.token_id, text.split())]

  def decode(self, ids):
    """Nothing: what was encoded is forgotten."""
    del ids
    return ""
