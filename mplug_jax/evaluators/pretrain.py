"""Evaluates pre-training by what it leaves for retrieval, zero-shot."""

from mplug_jax.evaluators.retrieval import Evaluator

__all__ = ["Evaluator"]
