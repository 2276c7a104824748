"""Beam search, greedy search, sampling and answer ranking over any step function."""
