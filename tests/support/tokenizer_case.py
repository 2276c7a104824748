"""A vocabulary and a corpus for the tests of tokenizers."""

# Ids differ from BERT's on purpose: nothing may rely on 0 / 100 / 101 / 102 / 103.
VOCAB = [
  "a",
  "man",
  "on",
  "horse",
  ".",
  ",",
  "?",
  "!",
  "'",
  "s",
  "t",
  "don",
  "10",
  "30",
  ":",
  "-",
  "shirt",
  "##s",
  "##ing",
  "rid",
  "cafe",
  "中",
  "文",
  "the",
  "[UNK]",
  "[PAD]",
  "[MASK]",
  "[SEP]",
  "[CLS]",
  "[unused7]",
  "[",
  "sep",
  "]",
]


CORPUS = [
  "What color is the circle?",
  "Is there a red shape in the image?",
  "Is the shape a triangle?",
  "Does the image contain a blue rectangle?",
  "What shape is in the picture?",
  "yes",
  "no",
  "circle",
  "rectangle",
  "triangle",
  "red",
  "green",
  "blue",
  "yellow",
  "teal",
  "gray",
  "brown",
]


LOCATIONS = [f"<loc_{i}>" for i in range(337)]
