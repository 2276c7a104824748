"""Benchmarks, and compilation for TPUs that are not attached."""
