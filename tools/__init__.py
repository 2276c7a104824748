"""Further commands: `python -m tools.NAME --help`."""
