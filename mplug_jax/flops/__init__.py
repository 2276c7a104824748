"""Operation counts of layers and traced programs, and hardware peaks."""
