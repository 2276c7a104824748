"""Errors of checkpoints, and one-line reasons of others."""

import errno
import os


class CheckpointError(RuntimeError):
  """A checkpoint could not be written or read; the message says which, why and what to do."""


def reason(error: BaseException) -> str:
  """The cause of a failed write, in the words of the operating system where they are found."""
  text = str(error)
  for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
    words = os.strerror(code)
    if words in text:
      return words
  return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"
