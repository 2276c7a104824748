"""Losses on arrays: language modeling, contrastive, hard negatives."""
