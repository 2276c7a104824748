"""Metric logs, progress lines and pictures of a run."""
