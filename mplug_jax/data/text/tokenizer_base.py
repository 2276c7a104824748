"""Interface and common parts of the tokenizers."""

import abc
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any, Protocol, Self, runtime_checkable

from mplug_jax.data.text import unicode
from mplug_jax.runtime import files
from mplug_jax.runtime.atomic_files import write_atomic, write_json

PAD, UNK, BOS, EOS, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONFIG_FILE = "tokenizer_config.json"
_CACHED_TEXTS = 32_768


@runtime_checkable
class Tokenizer(Protocol):
  """Tokenizer as models and data use it; bos is [CLS], eos is [SEP].

  Attributes:
    vocab_size: number of tokens.
    pad_id: id of [PAD].
    bos_id: id of [CLS].
    eos_id: id of [SEP].
    unk_id: id of [UNK].
    mask_id: id of [MASK].
    fingerprint: sha256 in hex of the defining file and options.
  """

  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int
  unk_id: int
  mask_id: int
  fingerprint: str

  def encode(self, text: str) -> list[int]:
    """Returns [bos, pieces...]; ends with eos only if the text does (docs/official.md item 31)."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, without [PAD], [CLS] and [SEP]; does not stop at any of them."""
    ...

  def token_id(self, name: str) -> int:
    """Returns the id of the token called `name`; raises ValueError if there is none."""
    ...


class FileTokenizer(abc.ABC):
  """Common part of tokenizers that are defined by the bytes of one file and by options.

  Attributes:
    kind: name of the kind of tokenizer.
    file_name: name of the saved file.
    vocab_size: number of tokens.
    fingerprint: sha256 in hex of file and options.
  """

  kind: str
  file_name: str
  vocab_size: int

  def __init__(self, source: str | os.PathLike[str] | bytes, **options: Any):
    """Reads the tokenizer.

    Args:
      source: path of the file, or its bytes.
      **options: options of the kind, which are saved with the file.
    """
    if isinstance(source, bytes):
      self._data = source
      self._origin = f"the {self.kind} data"
    else:
      self._origin = os.fspath(source)
      try:
        self._data = files.open_path(source).read_bytes()
      except FileNotFoundError as error:
        raise FileNotFoundError(f"Tokenizer file {self._origin} does not exist.") from error
    if not self._data:
      raise ValueError(f"Tokenizer file {self._origin} is empty.")
    self._data = self._read(self._data)
    self._options = options
    described = json.dumps({"kind": self.kind, **options}, sort_keys=True).encode()
    self.fingerprint = hashlib.sha256(described + b"\0" + self._data).hexdigest()
    self._build()
    self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id = map(
      self.token_id, SPECIAL_TOKENS
    )
    self._cached = functools.lru_cache(_CACHED_TEXTS)(self._encode_valid)

  def _read(self, data: bytes) -> bytes:
    """Converts the bytes of the file to those that define the tokenizer and are saved."""
    return data

  @abc.abstractmethod
  def _build(self) -> None:
    """Builds the tokenizer from the bytes, and sets vocab_size."""

  @abc.abstractmethod
  def _lookup(self, name: str) -> int | None:
    """Returns the id of a token, None if there is none."""

  @abc.abstractmethod
  def _encode(self, text: str) -> tuple[int, ...]:
    """Returns the token ids of a text."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, without [PAD], [CLS] and [SEP].

    Args:
      ids: token ids.
    """

  def __reduce__(self) -> tuple[functools.partial[Self], tuple[()]]:
    # Data workers get the bytes, not the path; caches are not shared.
    return functools.partial(type(self), self._data, **self._options), ()

  def encode(self, text: str) -> list[int]:
    """Returns [bos, pieces...].

    Args:
      text: the text.

    Raises:
      ValueError: it is no valid Unicode.
    """
    return list(self._cached(text))

  def _encode_valid(self, text: str) -> tuple[int, ...]:
    """Returns the token ids of a text; raises ValueError if it is no valid Unicode."""
    if unicode.invalid_unicode(text):
      raise ValueError(f"The text {text!r} is {unicode.problem(text)}.")
    return self._encode(text)

  def token_id(self, name: str) -> int:
    """Returns the id of a token.

    Args:
      name: the token.

    Raises:
      ValueError: there is no such token.
    """
    token_id = self._lookup(name)
    if token_id is None:
      raise ValueError(
        f"Token {name!r} is not in {self._origin}, a vocabulary of "
        f"{self.vocab_size} {self.kind} tokens."
      )
    return token_id

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes the files that `tokenizer.load` reads; each is replaced atomically.

    Args:
      directory: created if it does not exist.
    """
    config = {
      "kind": self.kind,
      "file": self.file_name,
      "options": self._options,
      "fingerprint": self.fingerprint,
    }
    files.make_folder(directory)
    write_atomic(os.path.join(directory, self.file_name), self._data)
    write_json(os.path.join(directory, CONFIG_FILE), config)


def check_same(tokenizer: Tokenizer, fingerprint: str, path: str) -> None:
  """Checks that a tokenizer has a recorded fingerprint.

  Args:
    tokenizer: the tokenizer.
    fingerprint: the recorded one.
    path: place of the record, for the message.

  Raises:
    ValueError: the fingerprints differ.
  """
  if tokenizer.fingerprint != fingerprint:
    raise ValueError(
      f"The tokenizer ({tokenizer.vocab_size} tokens, sha256 {tokenizer.fingerprint[:12]}) is "
      f"not the one recorded in {path} (sha256 {fingerprint[:12]}): use the files saved there."
    )
