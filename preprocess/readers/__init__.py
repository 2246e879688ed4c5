"""Annotation readers: one file each, one protocol (readers/protocol.py), registered in preprocess/__init__.py."""
