"""Reading annotations and images: files, archives, shards, TensorFlow Datasets, remote paths."""
