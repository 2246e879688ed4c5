"""Exceptions for mistakes that a user can correct. This module imports nothing else."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct. The text is one line: what is wrong, where, and what to do."""


class PhotoError(UserError):
    """A photo cannot be read. The text names the file and the reason."""


class LostProcessError(UserError):
    """Another process of a distributed job has died, so this one cannot continue."""
