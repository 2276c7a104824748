"""Colors and sizes that the pictures of a run share."""

INK = "#1d2530"
GRAY = "#6b7480"
GREEN = "#17803d"
RED = "#c62828"
FRAME = "#c9ced6"
BOX = "#3df56b"
CELL = 288  # width of a cell in pixels, images being at most that wide and high
