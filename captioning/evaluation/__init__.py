"""Scores of captions, and files of captions."""
