"""Saving, resuming and warm starts."""
