"""Records to fixed-size training examples, one module per task."""
