"""The mPLUG modules: pure functions of parameters and arrays."""
