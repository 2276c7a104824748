"""Configs, one file per task: `get_config(arg)` returns an ml_collections.ConfigDict."""
