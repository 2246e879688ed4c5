"""The tests that need a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_steps.common import Row, Setting, not_available

ROOT = Path(__file__).parents[2]
MARK = "needs a GPU"
ALWAYS = ("test_kernels.py", "test_cuda_graphs.py", "test_gpu_decoding.py", "test_feature_placement.py")
NEEDED = ("pytest", "hypothesis", "tyro", "pycocoevalcap")  # by tests/conftest.py and what it imports
TOY = ("test_feature_placement.py",)


def gpu_tests(setting: Setting) -> Iterator[Row]:
    """Run every test file that has a test with the reason "needs a GPU"."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield not_available("tests", f"they import {', '.join(missing)}: install them, or carry them on PYTHONPATH")
        return
    tests = ROOT / "tests"
    marked = [path.name for path in sorted(tests.glob("test_*.py")) if MARK in path.read_text("utf-8")]
    names = TOY if setting.device.type == "cpu" else dict.fromkeys([*ALWAYS, *marked])
    yield from run_tests([tests / name for name in names if (tests / name).exists()], setting.folder)


def run_tests(files: Sequence[Path], folder: Path) -> Iterator[Row]:
    """Rows of the numbers of tests that passed, failed and were skipped, and one of each failure."""
    report = folder / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-rs",
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *map(str, files),
    ]
    status = subprocess.run(command, cwd=ROOT).returncode
    if not report.exists():
        yield Row("tests", "did not run", met=False, target="all pass", note=f"pytest ended with status {status}")
        return
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures = [(case, bad) for case in cases for bad in (*case.findall("failure"), *case.findall("error"))]
    skipped = [skip.get("message", "") for case in cases for skip in case.findall("skipped")]
    passed = len(cases) - len({case for case, _ in failures}) - len(skipped)
    yield Row("passed", passed, note=", ".join(path.name for path in files))
    yield Row("skipped", len(skipped), note="; ".join(sorted(set(skipped))))
    yield Row("failed", len(failures), target="0", met=not failures)
    for case, bad in failures:
        message = (bad.get("message") or bad.text or "").strip().splitlines() or [""]
        yield Row(f"failed: {case.get('name')}", message[0][:200], note=case.get("classname", ""))
