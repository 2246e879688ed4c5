"""How another library's exception is shortened for an error message."""

import errno

import pytest

from captioning.runtime.library_errors import MAX_LENGTH, reason


@pytest.mark.parametrize("end", ["\n", "\x1c", "\u2028", ". "])
def test_only_the_first_sentence_of_an_error_is_shown(end):
    assert reason(ValueError(f"archive/a{end}b has changed")) == "archive/a"


@pytest.mark.parametrize(
    "error, phrase",
    [
        (OSError(errno.ENOSPC, "file write failed: a long story"), "No space left on device"),
        (OSError("Unable to synchronously open file (file signature not found)"), "file signature not found"),
        (OSError("Not a gzipped file (b'PK')."), "Not a gzipped file (b'PK')"),
        (KeyError("no such dataset"), "no such dataset"),
        (
            RuntimeError("it raised:\nCppCompileError: no compiler\nsee above"),
            "it raised: CppCompileError: no compiler",
        ),
        (ValueError("'utf-8' codec can't decode byte 0x80"), "'utf-8' codec can't decode byte 0x80"),
        (ValueError(), "ValueError"),
        (KeyError(7), "KeyError"),
        (EOFError("\n"), "EOFError"),
        (RuntimeError("[1, 2]"), "RuntimeError"),
    ],
)
def test_the_reason_is_one_short_phrase(error, phrase):
    assert reason(error) == phrase


def test_a_long_reason_is_cut():
    assert reason(ValueError("word " * 100)) == ("word " * 100)[:MAX_LENGTH].rstrip()
