"""Array operations with hand-written gradient rules, random generators and kernels.

Each is defined beside a reference of a few lines, which has JAX's gradient rule and generator.
config.model.ops selects one of the two sets, see table.py; docs/performance.md has the gains.
"""
