"""Sources, transforms and the input pipeline. Nothing here imports JAX."""
