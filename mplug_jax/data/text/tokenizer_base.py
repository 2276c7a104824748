"""The interface of tokenizers, and what all of them share."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from mplug_jax.runtime import files
from mplug_jax.runtime.atomic_files import write_atomic, write_json

PAD, UNK, BOS, EOS, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


CONFIG_FILE = "tokenizer_config.json"


_CACHED_TEXTS = 32_768


@runtime_checkable
class Tokenizer(Protocol):
  """What models and data need of a tokenizer. bos is [CLS], eos is [SEP]."""

  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int
  unk_id: int
  mask_id: int
  fingerprint: str  # sha256 in hex of the defining file and options

  def encode(self, text: str) -> list[int]:
    """[bos, pieces...]; ends with eos only if the text does (docs/official.md item 31)."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids, without [PAD], [CLS] and [SEP]; does not stop at any of them."""

  def token_id(self, name: str) -> int:
    """Id of the token called `name`; ValueError if there is none."""

  def save(self, directory) -> None:
    """Writes what `load` reads; every file appears complete or not at all."""


class FileTokenizer:
  """Common part: a tokenizer defined by the bytes of one file and by options."""

  kind: str
  file_name: str

  def __init__(self, source, **options):
    if isinstance(source, bytes):
      self._data, self._where = source, f"the {self.kind} data"
    else:
      self._where = os.fspath(source)
      try:
        self._data = files.open_path(source).read_bytes()
      except FileNotFoundError as error:
        raise FileNotFoundError(f"Tokenizer file {self._where} does not exist.") from error
    if not self._data:
      raise ValueError(f"Tokenizer file {self._where} is empty.")
    self._data = self._read(self._data)
    self._options = options
    described = json.dumps({"kind": self.kind, **options}, sort_keys=True).encode()
    self.fingerprint = hashlib.sha256(described + b"\0" + self._data).hexdigest()
    self._build()
    self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id = map(
      self.token_id, SPECIAL_TOKENS
    )
    self._cached = functools.lru_cache(_CACHED_TEXTS)(self._encode)

  def _read(self, data):
    """The bytes of the file -> those that define the tokenizer and are saved."""
    return data

  def __reduce__(self):  # Data workers get the bytes, not the path; caches are not shared.
    return functools.partial(type(self), self._data, **self._options), ()

  def encode(self, text: str) -> list[int]:
    return list(self._cached(text))

  def token_id(self, name: str) -> int:
    found = self._lookup(name)
    if found is None:
      raise ValueError(
        f"Token {name!r} is not in {self._where}, a vocabulary of "
        f"{self.vocab_size} {self.kind} tokens."
      )
    return found

  def save(self, directory) -> None:
    config = {
      "kind": self.kind,
      "file": self.file_name,
      "options": self._options,
      "fingerprint": self.fingerprint,
    }
    files.make_folder(directory)
    write_atomic(os.path.join(directory, self.file_name), self._data)
    write_json(os.path.join(directory, CONFIG_FILE), config)


def check_same(tokenizer: Tokenizer, fingerprint: str, where: str) -> None:
  """Raises ValueError if `tokenizer` is not the one whose fingerprint is recorded in `where`."""
  if tokenizer.fingerprint != fingerprint:
    raise ValueError(
      f"The tokenizer ({tokenizer.vocab_size} tokens, sha256 {tokenizer.fingerprint[:12]}) is "
      f"not the one recorded in {where} (sha256 {fingerprint[:12]}): use the files saved there."
    )
