"""Shards that the tests of storage share."""

import pytest

from tests.support import shard_files
from tools import prepare_data


@pytest.fixture(scope="module")
def index_cache(tmp_path_factory):
  """A folder of their own for the indices of shards."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture
def pattern(tmp_path):
  """Three tars of 1, 7 and 3 pairs, numbered from 0."""
  return shard_files.write(tmp_path / "pairs")


@pytest.fixture
def records(pattern, tmp_path):
  """The same pairs in ArrayRecord files of four."""
  assert (
    prepare_data.main(
      ["shards", pattern, f"--out={tmp_path}/records", "--records_per_shard=4", "--workers=1"]
    )
    == 0
  )
  return f"{tmp_path}/records/*.array_record"
