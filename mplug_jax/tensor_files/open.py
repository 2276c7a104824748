"""Opens PyTorch checkpoints as lazy mappings of NumPy arrays, detecting the format by content.

Formats: safetensors, torch.save, TorchScript and DeepSpeed. Files are untrusted: no code in them is
run (see torch_unpickler), every length is checked against the file size before use, and each error
is one sentence. Only files from before PyTorch 1.6 require PyTorch.
"""

import contextlib
import json
import os
from typing import Any

from mplug_jax.runtime import files
from mplug_jax.tensor_files.safetensors import open_safetensors
from mplug_jax.tensor_files.tensor_file import TensorFile
from mplug_jax.tensor_files.torch_archive import LEGACY_MAGIC, open_archive, open_legacy

# First bytes of files that people download instead of a checkpoint, with descriptions.
_OTHERS = (
  (
    b"version https://git-lfs",
    "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
  ),
  (b"<", "a web page or XML; the download was not the file"),
  (b"\x89PNG", "a PNG image"),
  (b"\xff\xd8\xff", "a JPEG image"),
  (b"\x1f\x8b", "gzip; unpack it first"),
  (b"\x89HDF", "HDF5; convert it to safetensors first"),
  (b"\x80", "a pickle that torch.save did not write; save it again with torch.save"),
)


def open_tensors(path: str | os.PathLike) -> TensorFile:
  """Opens a checkpoint for reading.

  Args:
    path: a safetensors file, a file by torch.save or torch.jit.save, or a folder with
      model.safetensors, pytorch_model.bin (either in shards with an index) or DeepSpeed's
      mp_rank_00_model_states.pt. The suffix does not matter.

  Returns:
    A TensorFile, read tensor by tensor; a file from before PyTorch 1.6 is loaded completely.

  Raises:
    FileNotFoundError: no such file, or none of the above in the folder.
    ValueError: not a checkpoint, damaged, without tensors, or not on this machine.
    ImportError: a file from before PyTorch 1.6, and PyTorch is not installed.
  """
  files.require_local(path, "a file of tensors")
  path = os.fspath(path)
  if os.path.isdir(path):
    return _open_folder(path)
  if not os.path.exists(path):
    raise FileNotFoundError(f"{path}: no such file or folder.")
  with open(path, "rb") as file:
    head = file.read(64)
  if head.startswith(b"PK\x03\x04"):
    return open_archive(path)
  if head.startswith(LEGACY_MAGIC):
    return open_legacy(path)
  if head[8:9] == b"{":
    return open_safetensors(path)
  kind = next(
    (text for magic, text in _OTHERS if head.lstrip().startswith(magic)),
    "" if head else "an empty file; get it again",
  )
  reason = f": it is {kind}" if kind else ""
  raise ValueError(f"{path}: not a PyTorch checkpoint (safetensors or torch.save){reason}.")


# Folders.

_CHOICES = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)


_DEEPSPEED = "mp_rank_{:02d}_model_states.pt"


def _open_folder(path: str) -> TensorFile:
  choices = [*_CHOICES, _DEEPSPEED.format(0)]
  with (
    contextlib.suppress(OSError),
    open(os.path.join(path, "latest"), encoding="utf-8", errors="replace") as file,
  ):
    # DeepSpeed writes the name of its newest save here; only a folder beside it is accepted.
    if (tag := file.read(256).strip()) and os.path.basename(tag) == tag and tag not in (".", ".."):
      choices.append(os.path.join(tag, _DEEPSPEED.format(0)))
  names = [name for name in choices if os.path.exists(os.path.join(path, name))]
  if not names:
    raise FileNotFoundError(
      f"{path}: a folder should have one checkpoint, it has none of {', '.join(choices)}."
    )
  if len(names) > 1:
    raise ValueError(
      f"{path}: a folder should have one checkpoint, it has {' and '.join(names)}; "
      "name one of them."
    )
  file = os.path.join(path, names[0])
  if file.endswith(".json"):
    return _open_shards(path, file)
  if file.endswith(_DEEPSPEED.format(0)) and os.path.exists(
    os.path.join(os.path.dirname(file), _DEEPSPEED.format(1))
  ):
    raise ValueError(
      f"{file}: the model is split over several mp_rank files; save it with tensor parallel size 1."
    )
  return open_tensors(file)


def _open_shards(path: str, index: str) -> TensorFile:
  """Opens the files listed in an index as one, with their tensors file by file."""
  try:
    with open(index, encoding="utf-8") as file:
      weight_map = json.load(file)["weight_map"]
    shards = sorted(set(weight_map.values()))
    if not all(name and os.path.basename(name) == name for name in shards):
      raise ValueError("shards outside the folder")
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise ValueError(
      f"{index}: not an index of shards ({type(error).__name__}: {error})."
    ) from error
  entries = {}
  parts = []
  with contextlib.ExitStack() as stack:
    for shard in shards:
      parts.append(part := stack.enter_context(open_tensors(os.path.join(path, shard))))
      differ = sorted(set(part) ^ {name for name, file in weight_map.items() if file == shard})
      if differ:
        raise ValueError(
          f"{part.path}: {os.path.basename(index)} lists other tensors than it has: "
          f"{', '.join(differ[:5])} ({len(differ)} differ)."
        )
      entries.update(part._entries)
    return TensorFile(
      path,
      entries,
      stack.pop_all().close,
      placeholders=_merged(parts, "placeholders"),
      ignored=_merged(parts, "ignored"),
      metadata=_merged(parts, "metadata"),
    )


def _merged(parts: list[TensorFile], attribute: str) -> dict[str, Any]:
  return {key: value for part in parts for key, value in getattr(part, attribute).items()}
