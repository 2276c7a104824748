"""Export for serving: export.py writes a folder, into which inputs.py and serve.py are copied.

Those two import nothing of mplug_jax.
"""
