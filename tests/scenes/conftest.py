"""Scenes that the tests share: making one takes a quarter of a millisecond."""

import functools

import pytest

from mplug_jax.scenes import scene as scenes


@pytest.fixture(scope="session")
def made():
  """Function (config, split, index) -> scene, as scenes.scene, which makes every scene once."""
  return functools.cache(scenes.scene)


@pytest.fixture(autouse=True)
def shared_scenes(made, monkeypatch):
  monkeypatch.setattr(scenes, "scene", made)
