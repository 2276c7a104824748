"""mPLUG (Li et al., EMNLP 2022) in JAX/Flax: cross-modal skip-connected vision-language models.

This file imports nothing, so that data workers start without JAX.
"""

__version__ = "0.1.0"
