"""Checks before training: machine, devices, data, memory and a few updates."""
