"""File name suffixes of images, in lower case."""

# Other formats that Pillow reads are rarely photos; AVIF needs Pillow 11.3.
IMAGE_SUFFIXES = (
  ".jpg",
  ".jpeg",
  ".jpe",
  ".jfif",
  ".png",
  ".webp",
  ".avif",
  ".bmp",
  ".gif",
  ".tif",
  ".tiff",
)
