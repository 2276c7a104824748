"""A tokenizer without a vocabulary, for compiling programs."""

from collections.abc import Iterable


class StandInTokenizer:
  """Tokenizer of `vocab_size` tokens, the special ones first; equal words have equal ids."""

  pad_id, unk_id, bos_id, eos_id, mask_id = range(5)
  fingerprint = ""

  def __init__(self, vocab_size: int):
    """Makes the tokenizer.

    Args:
      vocab_size: number of tokens.
    """
    self.vocab_size = vocab_size
    self._names: dict[str, int] = {}

  def token_id(self, name: str) -> int:
    """Returns the id of a token; names share ids once all are taken.

    Args:
      name: the token.
    """
    return self._names.setdefault(name, 5 + len(self._names) % (self.vocab_size - 5))

  def encode(self, text: str) -> list[int]:
    """Returns [bos] and one id per word.

    Args:
      text: the text.
    """
    return [self.bos_id, *map(self.token_id, text.split())]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns ""; the words are not stored.

    Args:
      ids: token ids.
    """
    del ids
    return ""
