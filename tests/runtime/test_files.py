"""Outputs that would replace a file of somebody else."""

import pytest

from mplug_jax.runtime import files


def test_an_output_replaces_no_file(tmp_path):
  path = tmp_path / "scores.json"
  files.require_new(path)
  files.require_new("")
  path.write_text("mine")
  with pytest.raises(FileExistsError, match="scores.json exists; .* --overwrite"):
    files.require_new(path)
  files.require_new(path, overwrite=True)
  assert path.read_text() == "mine"


@pytest.mark.parametrize(
  "content", ["mine\n", '{"config": 1}\n', '[{"config": 1, "command": 2}]\n', '{"config": 1, "com']
)
def test_lines_are_appended_to_files_of_the_command_only(tmp_path, content):
  path = tmp_path / "rows.jsonl"
  files.require_own_lines(path, ("config", "command"))
  path.write_text("")
  files.require_own_lines(path, ("config", "command"))
  path.write_text('{"config": 1, "command": 2, "seconds": 3}\n')
  files.require_own_lines(path, ("config", "command"))
  path.write_text(content)
  with pytest.raises(FileExistsError, match="no lines of this command"):
    files.require_own_lines(path, ("config", "command"))
