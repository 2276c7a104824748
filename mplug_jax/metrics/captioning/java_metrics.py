"""METEOR and SPICE, through the package pycocoevalcap (extra `eval`) and Java."""

import importlib
import os
import shutil
from collections.abc import Mapping, Sequence

_METHODS = {"METEOR": ("meteor.meteor", "Meteor"), "SPICE": ("spice.spice", "Spice")}
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class Unavailable(Exception):
  """Raised if a metric cannot be computed; the message is the reason."""


def score(
  name: str, candidates: Mapping[int, Sequence[str]], references: Mapping[int, Sequence[str]]
) -> float:
  """Returns METEOR or SPICE of a set of tokenized captions, between 0 and 1.

  Nothing is downloaded: without SPICE's models, which pycocoevalcap would fetch, SPICE is
  unavailable.

  Args:
    name: "METEOR" or "SPICE".
    candidates: {image: [caption]}, tokens separated by spaces.
    references: {image: [caption, ...]}, tokens separated by spaces.

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
    folder = os.path.join(os.path.dirname(package.__file__ or ""), "lib")
    missing = [jar for jar in _SPICE_JARS if not os.path.exists(os.path.join(folder, jar))]
    if missing:
      raise Unavailable(f"{' and '.join(missing)} of Stanford CoreNLP must be in {folder}")
  try:
    return float(getattr(package, method)().compute_score(references, candidates)[0])
  except Exception as error:  # of any kind, so that the other metrics are still reported
    raise Unavailable(f"{method} failed ({type(error).__name__}: {error})") from error
