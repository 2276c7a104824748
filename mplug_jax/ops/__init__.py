"""Array operations with gradient rules of their own."""
