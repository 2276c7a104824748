"""Operation counts of traced programs, and hardware peaks."""
