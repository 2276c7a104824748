"""Compiles programs for TPUs that are not attached, and estimates their time from their text."""
