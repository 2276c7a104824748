"""Reads and writes safetensors and PyTorch files without PyTorch."""
