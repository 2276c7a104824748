"""Benchmark metrics on plain values."""
