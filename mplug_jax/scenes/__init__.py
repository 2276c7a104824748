"""Procedural scenes of colored shapes, with captions, questions, boxes and statements.

Imports no JAX.
"""
