"""Silences Orbax log messages that are noise for users of this package."""

import logging


def _orbax(record: logging.LogRecord) -> bool:
  """Log filter: drops progress lines of Orbax and tracebacks of errors that it also raises."""
  return "/orbax/" not in record.pathname or record.levelno == logging.WARNING


def _asyncio(record: logging.LogRecord) -> bool:
  """Log filter: drops tracebacks of failed writes besides the one that is raised."""
  return "never retrieved" not in record.getMessage()


def quiet() -> None:
  """Removes progress lines of Orbax, and errors that it also raises, from the log."""
  logging.getLogger("absl").addFilter(_orbax)
  logging.getLogger("asyncio").addFilter(_asyncio)
