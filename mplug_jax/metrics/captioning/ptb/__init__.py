"""The Penn Treebank tokenizer of the COCO caption evaluation.

Own code rather than pycocoevalcap's: the same tokens without Java.
"""
