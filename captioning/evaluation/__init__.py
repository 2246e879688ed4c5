"""Metrics of captions, score reports, and files of captions."""
