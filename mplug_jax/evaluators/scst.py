"""Evaluates captions after self-critical training as those before it."""

from mplug_jax.evaluators.caption import Evaluator

__all__ = ["Evaluator"]
