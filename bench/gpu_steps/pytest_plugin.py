"""A pytest plugin: tests that need a GPU come first, and the outcome of each test is written when it is known."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

MARK = "needs a GPU"  # the reason of a skip
OUTCOMES = "KANTU_OUTCOMES"  # environment variable: the file to write to, one JSON object a line


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by whether they need a GPU. Other tests keep their order."""

    def needs_no_gpu(item: pytest.Item) -> bool:
        return not any(MARK in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))

    items.sort(key=needs_no_gpu)
    write({"collected": len(items)})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the outcome of a test: that of its call, or of a setup or teardown that fails or skips it."""
    if report.when == "call" or report.outcome != "passed":
        write({"test": report.nodeid, "outcome": report.outcome, "why": why(report)})


def why(report: pytest.TestReport) -> str:
    """The reason of a skip, or the error of a failure, in one line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.splitlines()[0][:200] if crash else ""


def write(outcome: dict) -> None:
    """Append a line."""
    with Path(os.environ[OUTCOMES]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(outcome) + "\n")
