"""Where annotations and images are stored: files, archives, shards, TFDS, remote."""
