"""Tokenizers, text cleaning and masking."""
