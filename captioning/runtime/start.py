"""What every command does first: it refuses Windows, and prepares for signals. Nothing is imported that takes time."""

from __future__ import annotations

import sys

from captioning.runtime.signals import install_exit_handlers, is_interactive

WINDOWS = "error: Windows: Kantu runs in WSL2, the Linux within Windows, with the GPU; docs/windows.md has the steps"


def start_command() -> None:
    """Exit with one line on Windows; elsewhere end in one line on a stop signal, which may come while torch loads."""
    if sys.platform == "win32":
        sys.exit(WINDOWS)
    if not is_interactive():
        install_exit_handlers()
