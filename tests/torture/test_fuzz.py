"""The fuzz targets of tests/fuzz, for a bounded time: libFuzzer looks for bytes that lead where none have led."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEMORY = 2000  # MB, the most in one piece; the whole would count what the process that starts it has


def fuzz(target, corpus, seconds):
    """Run a target from its first inputs on -> how many inputs it tried. Fails with what the target said."""
    command = [
        sys.executable,
        "-m",
        f"tests.fuzz.{target}",
        corpus,
        f"-max_total_time={seconds}",
        "-timeout=20",
        f"-malloc_limit_mb={MEMORY}",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
        f"-artifact_prefix={corpus}/crash-",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-3000:]
    return int(re.search(r"stat::number_of_executed_units: *(\d+)", done.stderr)[1])


@pytest.fixture(autouse=True)
def atheris():
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: make torture brings it where there is one for this Python")


def test_whatever_the_bytes_of_annotations_there_are_records_or_one_line(tmp_path, times, tally):
    tally("inputs to the reader of annotations", fuzz("annotations", tmp_path, times(1, 60)))


def test_whatever_the_bytes_of_a_checkpoint_there_is_a_captioner_or_one_line(tmp_path, times, tally):
    tally("inputs to the reader of checkpoints", fuzz("checkpoints", tmp_path, times(1, 120)))
