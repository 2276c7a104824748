"""One source per data set: indexable records of images and texts."""
