"""One way to shorten another library's exception for an error message."""

from __future__ import annotations

import os
import re

MAX_LENGTH = 120  # characters


def reason(error: BaseException) -> str:
    """A short phrase without a full stop: the system's words for its own errors, else the first sentence.

    HDF5 wraps its reason in "Unable to ... (reason)"; the wrapping is removed. A first line that ends in a colon, such
    as torch.compile's, introduces the second one, so both are returned. An exception without words is named by its
    class.
    """
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and isinstance(number, int) and number > 0:
        return os.strerror(number)
    text = error.args[0] if isinstance(error, KeyError) and error.args else error  # str(KeyError) adds quotes
    lines = str(text).strip().splitlines() or [""]
    phrase = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    phrase = re.sub(r"^Unable to [\w ]+\((.*)\)$", r"\1", phrase)
    phrase = phrase.partition(". ")[0][:MAX_LENGTH].rstrip(" .")
    return phrase if re.search("[A-Za-z]", phrase) else type(error).__name__
