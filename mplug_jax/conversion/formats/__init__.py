"""Foreign checkpoint formats."""
