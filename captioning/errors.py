"""Errors that a user can cause and mend."""

from __future__ import annotations


class UserError(Exception):
    """A user caused it and can mend it. The text is one line: what, where, what to do."""


class PhotoError(UserError):
    """A photo cannot be read. The text names the file and the reason."""
