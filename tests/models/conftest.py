"""Inputs and models that the tests of models share."""

import numpy as np
import pytest

from tests.support.models_case import Case, texts


@pytest.fixture(scope="session")
def inputs():
  """2 images, 3 questions about each, 3 answers to each."""
  rng = np.random.default_rng(1)
  return (
    rng.normal(size=(2, 16, 16, 3)).astype(np.float32),
    texts(rng, 2, 3, 5),
    texts(rng, 2, 3, 3, 5),
  )


@pytest.fixture(scope="session")
def connected(inputs):
  return Case(inputs)


@pytest.fixture(scope="session")
def asymmetric(inputs):
  return Case(inputs, stride=2)  # no connected layer: the image keeps a row of its own
