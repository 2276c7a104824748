"""Shards of eight records for the tests."""

import importlib

from mplug_jax.data.errors import ImageError
from tests.support.shard_files import caption, picture


def content(source):
  """[(encoded image, caption)]; an image that cannot be read is None."""
  return [
    (None if isinstance(r["image"], ImageError) else r["image"], *r["captions"])
    for r in map(source.__getitem__, range(len(source)))
  ]


def expected(count):
  return [(picture(i), caption(i).lower()) for i in range(count)]


def config(name, arg, **changes):
  c = importlib.import_module(f"configs.{name}").get_config(f"tiny,{arg}")
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return c
