"""Errors of checkpoints, and one-line reasons of other errors."""

import errno
import os


class CheckpointError(RuntimeError):
  """A checkpoint could not be written or read; the message says which one, why and what to do."""


def reason(error: BaseException) -> str:
  """Returns the operating system's message if the text contains one, else type and first line.

  Args:
    error: error of a read or a write.
  """
  text = str(error)
  for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
    message = os.strerror(code)
    if message in text:
      return message
  return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}"
