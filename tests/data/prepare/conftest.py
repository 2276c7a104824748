"""Downloads that the tests of VQA preparation share."""

import pytest

from tests.support.vqa_case import (
  make_loose,
  make_zipped,
)


@pytest.fixture
def loose(tmp_path):
  return make_loose(tmp_path)


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
  return make_zipped(tmp_path_factory)
