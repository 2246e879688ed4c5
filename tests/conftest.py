"""What every test shares: one thread, no screen, no network, and the data beside the project, where it is."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads only get in each other's way
NOTES = tempfile.TemporaryDirectory(prefix="kantu-tests-")
CALLS = Path(NOTES.name, "calls")  # to other machines than this one: see tests/loopback
os.environ["KANTU_CALLS"] = str(CALLS)
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).with_name("loopback")), os.environ.get("PYTHONPATH")])
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import extract_features  # noqa: E402
import train  # noqa: E402
from captioning.decoders import DECODERS  # noqa: E402
from config import ExtractFeatures, Train  # noqa: E402
from tests.loopback.sitecustomize import watch  # noqa: E402
from tests.small import ENCODER, TINY, make_small_data  # noqa: E402

sys.addaudithook(watch)
torch.set_num_threads(1)
hypothesis.settings.register_profile("house", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="tests/torture at full length: make torture")


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """times(few, many): how often to attack, few in the suite, many under --torture."""
    return lambda few, many: many if request.config.getoption("--torture") else few


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """tally("kills of train.py", 50): counted in the table of RELIABILITY.md, if the test passes."""
    return lambda attack, count=1: request.node.user_properties.append(("attack", (attack, count)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of RELIABILITY.md."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "attack" and report.when == "call":
                counts[value[0]] += value[1]
    if counts and terminalreporter.config.getoption("--torture"):
        terminalreporter.write_line("| attack | withstood |\n|---|---|")
        for attack, count in sorted(counts.items()):
            terminalreporter.write_line(f"| {attack} | {count:,} |")


@pytest.fixture(autouse=True)
def no_network() -> Iterator[None]:
    """A test that calls another machine fails, in whatever process, even where the code that called forgave it."""
    yield
    if CALLS.exists():
        calls = CALLS.read_text("utf-8")
        CALLS.unlink()
        pytest.fail(f"called another machine: {calls}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos, captions and weights beside the project."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no real data beside the project (../shared)")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder data/small of 24 tiny photos with captions; see tests/small.py. Tests only read it."""
    return make_small_data(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def made(small_data, tmp_path_factory):
    """The small data set with cached features, and a run of each decoder on them -> the folder they lie in."""
    folder = small_data.parents[1]
    before = os.getcwd()
    os.chdir(folder)
    extract_features.main(ExtractFeatures(small_data, **ENCODER))
    for decoder in DECODERS:
        train.main(Train(Path("data/small"), decoder, decoder=decoder, epochs=3, precision="float32", **TINY))
    os.chdir(before)
    return folder


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made)
    return made
