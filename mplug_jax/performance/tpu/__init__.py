"""Programs compiled for TPUs that are not there, and what their text says of the time they need."""
