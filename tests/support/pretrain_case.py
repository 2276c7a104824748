"""The tiny pre-training config."""

import importlib


def config(arg="tiny", name="pretrain", **changes):
  c = importlib.import_module(f"configs.{name}").get_config(arg)
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return c


SMALL = dict(model__image_size=32, data__size=48, compilation_cache="")
