"""What an exception of a library says, short enough for one line of ours."""

from __future__ import annotations

import os
import re

MAX_LENGTH = 120  # characters


def reason(error: BaseException) -> str:
    """A short phrase without a full stop: the system's words for its own errors, else the first sentence.

    HDF5 wraps its reason in "Unable to ... (reason)"; the wrapping is removed. An exception that says nothing is named
    by its class.
    """
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and isinstance(number, int) and number > 0:
        return os.strerror(number)
    lines = str(error).strip("'\" \n").splitlines() or [""]
    phrase = re.sub(r"^Unable to [\w ]+\((.*)\)$", r"\1", lines[0]).partition(". ")[0][:MAX_LENGTH].rstrip(" .")
    return phrase if re.search("[A-Za-z]", phrase) else type(error).__name__
