"""Configs and records of the classification tests."""

import numpy as np

from tests.support import classification_run

WORDS = ["only", "the", "left", "right", "leftmost", "image", "shows", "a", "cat"]


def words(row):
  return " ".join(WORDS[i - 100] for i in np.ravel(row) if i >= 100)


def data_config(file, arg, **changes):
  return classification_run.config(file, arg, **changes).data
