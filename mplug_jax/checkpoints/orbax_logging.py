"""What of Orbax's log a user of this package need not read."""

import logging


def _orbax(record: logging.LogRecord) -> bool:
  """Log filter: no progress lines of Orbax, no tracebacks of errors that the caller gets anyway."""
  return "/orbax/" not in record.pathname or record.levelno == logging.WARNING


def _asyncio(record: logging.LogRecord) -> bool:
  """Log filter: no tracebacks of writes that failed beside the one that the caller gets."""
  return "never retrieved" not in record.getMessage()


def quiet() -> None:
  """Keeps progress lines of Orbax, and errors that the caller gets anyway, out of the log."""
  logging.getLogger("absl").addFilter(_orbax)
  logging.getLogger("asyncio").addFilter(_asyncio)
