"""Captions as flat arrays, packed into batches."""
