"""Fixtures of the tests that run commands on real files."""

from __future__ import annotations

import pytest

from tests.torture.artefacts import Artefacts, run_ok
from tests.torture.processes import WORK, outputs, remove_outputs, run_alone, write_many_captions


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory):
    """One folder of files for all tests; each test restores what it changes."""
    return Artefacts(tmp_path_factory.mktemp("work"))


@pytest.fixture
def workdir(artefacts, monkeypatch):
    """The current folder, with everything that the commands of WORK read."""
    artefacts.enter(monkeypatch)
    write_many_captions()
    yield artefacts.folder
    artefacts.restore()


@pytest.fixture(scope="session")
def undisturbed():
    """undisturbed(name): the outputs of that command of WORK when nothing disturbs it, and its CPU seconds."""
    results = {}

    def measure(name: str) -> tuple[dict, float]:
        if name not in results:
            run_ok(WORK[name])  # in this process: its forks inherit the imports and the font cache
            remove_outputs()
            seconds = run_alone(WORK[name])
            results[name] = outputs(), seconds
            remove_outputs()
        return results[name]

    return measure
