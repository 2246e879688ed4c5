"""Settings and fixtures of all tests: one thread, no display, no network, no Java, and small data sets and runs."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

gc.disable()  # until all tests are imported: see pytest_collection_finish
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost more than they gain on small tensors
CALLS_FOLDER = tempfile.TemporaryDirectory(prefix="kantu-tests-")
CALLS = Path(CALLS_FOLDER.name, "calls")  # lists attempted calls to other machines: see tests/loopback
os.environ["KANTU_CALLS"] = str(CALLS)
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).with_name("loopback")), os.environ.get("PYTHONPATH")])
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.loopback.sitecustomize import watch  # noqa: E402

# The fixtures import torch and what needs it: with xdist, the process that hands out the tests does without.

# tqdm's own lock is shared by all forks: a killed one would never release it. Its monitor thread could hold any lock
# while a test forks.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0
sys.addaudithook(watch)
hypothesis.settings.register_profile("torture", deadline=None)  # a busy machine must not fail a test
hypothesis.settings.register_profile("suite", deadline=None, max_examples=30)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torture", action="store_true", help="run tests at full length, as make torture does")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the number of examples of each property, before a test file is imported: 30 in the suite, else 100."""
    hypothesis.settings.load_profile("torture" if config.getoption("--torture") else "suite")


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the imported modules, whose millions of objects take it most of a second."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    atexit.register(gc.unfreeze)  # else Triton takes them for leaks
    gc.enable()


@pytest.fixture(scope="session")
def times(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """times(few, many): the number of repetitions: `few` in the suite, `many` under --torture."""
    return lambda few, many: many if request.config.getoption("--torture") else few


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """tally("kills of train.py", 50): if the test passes, add 50 to that row of the table in RELIABILITY.md."""
    return lambda attack, count=1: request.node.user_properties.append(("attack", (attack, count)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of RELIABILITY.md."""
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
    """Fail a test if any of its processes calls another machine, even if the calling code ignores the error."""
    yield
    if CALLS.exists():
        calls = CALLS.read_text("utf-8")
        CALLS.unlink()
        pytest.fail(f"called another machine: {calls}")


@pytest.fixture(scope="session", autouse=True)
def no_java() -> Iterator[None]:
    """Leave METEOR out of all score reports, as on a machine without Java, which takes 10 CPU seconds to start.

    tests/test_java_metrics.py runs it. A test that starts a new process hides Java from it with an empty PATH.
    """
    from captioning.evaluation import score_report

    skipped = "skipped: METEOR needs Java, which is not installed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_report, "meteor_score", lambda candidates, references: skipped)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos, captions and weights next to the project."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no real data next to the project (../shared)")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder data/small: 24 tiny photos with captions, made by tests/small.py. Tests must not change it."""
    from tests.small import make_small_data

    return make_small_data(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small_runs(small_data: Path) -> Path:
    """The folder with data/small, its cached features, and checkpoints/NAME: a trained run of each decoder NAME."""
    import extract_features
    import train
    from captioning.decoders import DECODERS
    from config import ExtractFeatures, Train
    from tests.small import ENCODER, TINY

    folder = small_data.parents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        extract_features.main(ExtractFeatures(small_data, **ENCODER))
        for decoder in DECODERS:
            settings = {"decoder": decoder, "epochs": 3, "precision": "float32", **TINY}
            train.main(Train(Path("data/small"), decoder, preview_photos=int(decoder == "attention"), **settings))
    return folder


@pytest.fixture
def here(small_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`small_runs` as the current folder."""
    monkeypatch.chdir(small_runs)
    return small_runs
