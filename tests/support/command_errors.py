"""Checks that a failed command prints one sentence and changes no file."""

from tools import convert_checkpoint


def snapshot(folder):
  """Returns {path: bytes, None for a folder} of a folder's content, hidden files too."""
  return {str(path): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def one_sentence(text, *messages):
  assert text.startswith("error: "), text
  assert text.endswith("\n"), text
  assert text.count("\n") == 1, text
  assert "Traceback" not in text, text
  for message in messages:
    assert message in text, text


def refused(capsys, folder, main, *args, messages=()):
  """Checks that a command fails with one sentence that contains the messages and writes nothing."""
  before = snapshot(folder)
  capsys.readouterr()
  assert main([str(arg) for arg in args]) == 1
  out, err = capsys.readouterr()
  assert not out
  one_sentence(err, *messages)
  assert snapshot(folder) == before


def refused_conversion(capsys, folder, dest, flags, messages):
  """Checks that x.pth of the folder is not converted to `dest`, as `refused` does."""
  source = folder / "x.pth"
  refused(capsys, folder, convert_checkpoint.main, source, folder / dest, *flags, messages=messages)
