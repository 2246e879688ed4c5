"""What the tests share that run commands on real files."""

from __future__ import annotations

import pytest

from tests.torture.artefacts import Artefacts, does
from tests.torture.processes import WORK, does_alone, forget, write_many_captions, written


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Artefacts(tmp_path_factory.mktemp("work"))


@pytest.fixture
def at_work(workplace, monkeypatch):
    """The current folder has what the commands of WORK read."""
    workplace.enter(monkeypatch)
    write_many_captions()
    yield workplace.folder
    workplace.mend()


@pytest.fixture(scope="module")
def undisturbed():
    """undisturbed(what): what a command writes that nobody disturbs, and how many seconds it computes."""
    known = {}

    def of(what: str) -> tuple[dict, float]:
        if what not in known:
            does(WORK[what])  # in this process: those that it forks have then imported all, and know the fonts
            forget()
            seconds = does_alone(WORK[what])
            known[what] = written(), seconds
            forget()
        return known[what]

    return of
