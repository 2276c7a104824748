"""Conversion of weights from and to PyTorch."""
