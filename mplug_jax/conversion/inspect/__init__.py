"""Checkpoint inspection and comparison."""
