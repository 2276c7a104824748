"""Conversions of BERT and CLIP through files, and their checks."""

import numpy as np
import pytest

from mplug_jax.checkpoints import reading
from mplug_jax.conversion import importer, mapping
from mplug_jax.conversion.geometry import infer_geometry
from mplug_jax.conversion.names import official_names
from mplug_jax.tensor_files import write


def converted(tensors, folder, **options):
  """Converts tensors to `folder`/converted.safetensors; returns {path: array}."""
  folder.mkdir()
  write.save_safetensors(folder / "model.safetensors", tensors)
  dest = folder / "converted.safetensors"
  importer.convert_checkpoint(folder / "model.safetensors", dest, **options)
  return reading.load_arrays(dest, "params")


def assert_leaves(result, expected):
  assert result.keys() == expected.keys()
  for path, x in expected.items():
    np.testing.assert_array_equal(result[path], x, err_msg=path)


def saved(tensors, path, **options):
  write.save_pth(path, tensors, **options)
  return path


def refused(tensors, message, **options):
  def convert():
    names = official_names(tensors)
    renamed = {name: tensors[key] for name, key in names.items()}
    mapping.params_from_torch(
      renamed, infer_geometry({name: x.shape for name, x in renamed.items()}, **options)
    )

  with pytest.raises(ValueError, match=message) as error:
    convert()
  assert "\n" not in str(error.value)
