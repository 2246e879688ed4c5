"""Captions from a decoder: beam search and sampling."""
