"""Captions and runs to look at: plots, HTML, the dashboard."""
