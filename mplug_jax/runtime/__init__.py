"""This process and machine: signals, atomic files, process settings, accelerators."""
