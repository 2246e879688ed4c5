"""A command line that cannot be read ends in one line that names what is wrong, whatever characters tyro draws with."""

from __future__ import annotations

import io
import os
import sys

import pytest

import config
from captioning.runtime import command_line
from captioning.runtime.usage_errors import usage_error

LONG = "/photos of mine/" + 90 * "x" + "/1.jpg"
ERRORS = {
    "train checkpoints/x --resume": "--run STR is required (name of the run, which is written to checkpoints/RUN)",
    "train --epochs 3": "PATH is required (folder made by python -m preprocess); --run STR is required (name of the "
    "run, which is written to checkpoints/RUN)",
    "train data/x --rum x": "--run STR is required (name of the run, which is written to checkpoints/RUN); "
    "unrecognized options: --rum, x",
    "train data/x --run a --epochs three": "--epochs: must be INT, not 'three'",
    "train data/x --run a --learning-rate 1e-3x": "--learning-rate: must be FLOAT, not '1e-3x'",
    "train data/x --run a --decoder lstn": "--decoder lstn: must be one of adaptive, aoa, attention, hard-attention, "
    "lstm, transformer, updown, xlan",
    "train data/x --run a --resum": "unrecognized options: --resum; perhaps you meant --resume",
    "train data/x --run": "--run: needs a value",
    "preprocess --scenes 9": "PATH is required (folder to write, such as data/aic)",
    "preprocess data/x --train a": "--train: must be PATH PATH, not 'a'",
    "preprocess data/x --train": "--train: must be PATH PATH, not nothing",
    "preprocess data/x --language fr": "--language fr: must be one of en, ja, th, zh",
    "extract data/x --batch-sise 3": "unrecognized options: --batch-sise, 3; perhaps you meant --batch-size",
    "extract": "PATH is required (folder made by python -m preprocess)",
    "generate a b --beam-size x": "--beam-size: must be INT, not 'x'",
    "generate a b --nope": "unrecognized options: --nope",
}
COMMANDS = {
    "train": config.Train,
    "preprocess": config.Preprocess,
    "extract": config.ExtractFeatures,
    "generate": config.Generate,
}


def error_line(monkeypatch, command, arguments, encoding):
    """What `parse` prints on stderr. tyro draws boxes in Unicode if the encoding of stdout is utf-8."""
    stderr = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        patch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit) as stop:
            command_line.parse(COMMANDS[command], arguments)
    assert stop.value.code == 2
    return stderr.getvalue()


@pytest.mark.parametrize("line", ERRORS)
def test_every_usage_error_says_in_one_line_what_is_wrong(monkeypatch, line):
    command, *arguments = line.split()
    assert error_line(monkeypatch, command, arguments, "utf-8") == f"error: {ERRORS[line]}; see --help\n"


def test_the_line_is_the_same_without_unicode_and_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    arguments = ["data/x", "--run", "a", LONG]
    for encoding in ("utf-8", "ascii"):
        line = error_line(monkeypatch, "train", arguments, encoding)
        assert line == f"error: unrecognized options: {LONG}; see --help\n"
    missing = "preprocess --scenes 9"
    assert (
        error_line(monkeypatch, "preprocess", ["--scenes", "9"], "ascii") == f"error: {ERRORS[missing]}; see --help\n"
    )
    assert os.environ["COLUMNS"] == "40"


def test_an_error_of_an_unknown_form_is_shown_in_its_own_words():
    box = "╭─ New ───╮\n│ first   │\n│ second  │\n│ ─────── │\n│ third   │\n╰─────────╯\n"
    assert usage_error(box) == "first second; third; see --help"
    assert usage_error("") == "see --help"
