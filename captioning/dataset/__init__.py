"""Captions as flat arrays, and the packed batches made of them."""
