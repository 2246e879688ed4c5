"""The tests that need a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_steps.common import Row, Setting, not_available

ROOT = Path(__file__).parents[2]
MARK = 'reason="needs a GPU"'  # of a skip
ALWAYS = ("test_kernels.py", "test_cuda_graphs.py", "test_gpu_decoding.py", "test_feature_placement.py")
NEEDED = ("pytest", "hypothesis", "tyro", "pycocoevalcap")  # by tests/conftest.py and what it imports
PLUGIN = "gpu_steps.pytest_plugin"
SECONDS = 90.0  # for all tests; those that need a GPU come first
TOY = ("test_feature_placement.py",)


def gpu_tests(setting: Setting) -> Iterator[Row]:
    """Run every test file that has a test that needs a GPU."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield not_available("tests", f"they import {', '.join(missing)}: install them, or carry them on PYTHONPATH")
        return
    tests = ROOT / "tests"
    marked = [path.name for path in sorted(tests.glob("test_*.py")) if MARK in path.read_text("utf-8")]
    names = TOY if setting.device.type == "cpu" else dict.fromkeys([*ALWAYS, *marked])
    yield from run_tests([tests / name for name in names if (tests / name).exists()], setting.folder)


def run_tests(files: Sequence[Path], folder: Path, seconds: float = SECONDS) -> Iterator[Row]:
    """Run the files for at most these seconds -> the numbers of tests, and a row of each failure."""
    outcomes = folder / "outcomes.jsonl"
    pytest = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-p", PLUGIN]
    paths = [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "KANTU_OUTCOMES": str(outcomes), "PYTHONPATH": os.pathsep.join(paths)}
    try:
        status: int | str
        status = subprocess.run([*pytest, *map(str, files)], cwd=ROOT, env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        status = f"stopped after {seconds:g} s"
    lines = outcomes.read_text("utf-8").splitlines() if outcomes.exists() else []
    if not lines:
        yield Row("tests", "did not run", target="all pass", met=False, note=f"pytest: {status}")
        return
    collected, *results = map(json.loads, lines)
    by_outcome: dict[str, list[dict[str, str]]] = {outcome: [] for outcome in ("passed", "skipped", "failed")}
    for result in results:
        by_outcome[result["outcome"]].append(result)
    names = ", ".join(path.name for path in files)
    yield Row("passed", len(by_outcome["passed"]), note=f"of {collected['collected']} in {names}; pytest: {status}")
    skipped = by_outcome["skipped"]
    yield Row("skipped", len(skipped), note="; ".join(sorted({result["why"] for result in skipped})))
    failed = by_outcome["failed"]
    yield Row("failed", len(failed), target="0", met=not failed)
    for result in failed:
        yield Row(f"failed: {result['test'].rpartition('::')[2]}", result["why"], note=result["test"])
