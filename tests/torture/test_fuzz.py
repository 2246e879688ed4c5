"""Run the fuzz targets of tests/fuzz for a limited time: libFuzzer searches for inputs that reach new code."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEMORY = 2000  # MB, for one allocation; a limit on the process would include what the parent has allocated


def fuzz(target, corpus, seconds):
    """Run a target on its seeds and their mutations. Return the number of inputs. Fails with its stderr."""
    command = [
        sys.executable,
        "-m",
        f"tests.fuzz.{target}",
        corpus,
        f"-max_total_time={seconds}",
        "-timeout=120",
        f"-malloc_limit_mb={MEMORY}",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
        f"-artifact_prefix={corpus}/crash-",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-3000:]
    return int(re.search(r"stat::number_of_executed_units: *(\d+)", done.stderr)[1])


@pytest.fixture(autouse=True)
def atheris(times):
    if times(True, False):
        pytest.skip("long form: make torture")
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed; make torture installs it if it supports this Python")


def test_any_bytes_as_annotations_give_records_or_one_line(tmp_path, tally):
    tally("inputs to the reader of annotations", fuzz("annotations", tmp_path, 60))


def test_any_bytes_as_a_checkpoint_give_a_captioner_or_one_line(tmp_path, tally):
    tally("inputs to the reader of checkpoints", fuzz("checkpoints", tmp_path, 120))
