"""METEOR and SPICE, which exist in Java alone: through the package pycocoevalcap (extra `eval`), where it and Java are installed."""

import importlib
import os
import shutil
from collections.abc import Mapping, Sequence

_METHODS = {"METEOR": ("meteor.meteor", "Meteor"), "SPICE": ("spice.spice", "Spice")}
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class Unavailable(Exception):
  """Why a metric was not computed."""


def score(
  name: str, candidates: Mapping[int, Sequence[str]], references: Mapping[int, Sequence[str]]
) -> float:
  """METEOR or SPICE of a set of tokenized captions.

  Nothing is downloaded: without SPICE's models, which pycocoevalcap would fetch, SPICE is
    unavailable.

  Args:
    name: "METEOR" or "SPICE".
    candidates: {image: [caption]}. references: {image: [caption, ...]}. Tokens separated by spaces.

  Returns:
    The score of the set, between 0 and 1.

  Raises:
    Unavailable: pycocoevalcap, Java or the models are missing, or the Java program failed.
  """
  module, method = _METHODS[name]
  try:
    package = importlib.import_module(f"pycocoevalcap.{module}")
  except ImportError as error:
    raise Unavailable(
      f"pycocoevalcap cannot be imported ({error}); pip install pycocoevalcap"
    ) from error
  if shutil.which("java") is None:
    raise Unavailable("there is no `java` on the path; install a Java runtime")
  if name == "SPICE":
    folder = os.path.join(os.path.dirname(package.__file__), "lib")
    missing = [jar for jar in _SPICE_JARS if not os.path.exists(os.path.join(folder, jar))]
    if missing:
      raise Unavailable(f"{' and '.join(missing)} of Stanford CoreNLP must be in {folder}")
  try:
    return float(getattr(package, method)().compute_score(references, candidates)[0])
  except (
    Exception
  ) as error:  # whatever a foreign program and its wrapper raise; the other metrics stand
    raise Unavailable(f"{method} failed ({type(error).__name__}: {error})") from error
