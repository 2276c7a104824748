"""Image and video decoding and augmentation."""
