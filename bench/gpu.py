"""Everything that must be proven on a GPU, in one command of at most 9 minutes.

    python bench/gpu.py                                        writes gpu-results/results.json and results.md
    python bench/gpu.py --out h200/results.json --minutes 9
    python bench/gpu.py --steps gradients epoch                some of the steps
    python bench/gpu.py --toy                                  tiny sizes on the CPU: shows that the steps run
    python bench/gpu.py --out h200/results.json --markdown     the table of finished results, for bench/results/

Each step is a process with its own time limit. One that hangs, crashes or runs out of memory is recorded with what it
had measured, and the next one runs. The results are written after every step. A step that no longer fits into
--minutes is skipped and says so. What the steps print is in the folder `logs` beside the results.

Needs torch, torchvision, numpy, h5py, tqdm, Pillow and simplejpeg. What else a step needs is not available without it:
Triton for the kernels, timm for its encoders, tyro for an extraction, and for "tests" also pytest, hypothesis and
pycocoevalcap. Where nothing can be installed, carry them in a folder on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # it runs where the package is not installed

from captioning.errors import UserError  # noqa: E402
from captioning.runtime.files import atomic_text  # noqa: E402
from captioning.runtime.log import commit  # noqa: E402

REQUIRED = ("torch", "torchvision", "numpy", "h5py", "tqdm", "PIL", "simplejpeg")
RESULTS = Path("gpu-results") / "results.json"
LOGS = "logs"
NO_GPU = 3  # exit status of a step that found no GPU
MIN_SECONDS = 10.0  # a step that has less time left is skipped
MARGIN = 5.0  # seconds kept for ending a step and writing the results
OPTIONAL = ("triton", "tyro", "pycocoevalcap", "jieba", "nltk", "visdom", "timm")  # a step without them goes on
TAIL = 8  # last lines of a failed step's output that are kept in the results


@dataclass(frozen=True)
class Step:
    """A part of the command, which runs in a process of its own."""

    function: str  # module:function, called with a Setting -> an iterator of Rows
    seconds: float  # limit

    def command(self, rows: Path, toy: bool) -> list[str]:
        """The command of the process. It writes the rows, one JSON object a line."""
        return [sys.executable, str(Path(__file__).resolve()), "--child", self.function, str(rows), str(int(toy))]


# in the order of importance: the last ones are skipped if time runs out
STEPS = {
    "environment": Step("gpu_steps.environment:environment", 40),
    "tests": Step("gpu_steps.gpu_tests:gpu_tests", 105),
    "growing": Step("gpu_steps.correctness:growing_lengths", 75),
    "gradients": Step("gpu_steps.correctness:gradient_errors", 90),
    "resume": Step("gpu_steps.correctness:stop_and_resume", 40),
    "epoch": Step("gpu_steps.speed:epochs", 120),
    "validation": Step("gpu_steps.speed:validation", 45),
    "kernels": Step("gpu_steps.kernels:each_kernel", 45),
    "memory": Step("gpu_steps.speed:capture_memory", 40),
    "extraction": Step("gpu_steps.data:extraction", 75),
    "residence": Step("gpu_steps.data:residence", 60),
    "cider": Step("gpu_steps.speed:cider_idle_share", 40),
    "compiled": Step("gpu_steps.data:compiled_extraction", 90),
    "library": Step("gpu_steps.speed:the_library_s_way", 120),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. argparse, since a GPU machine may lack tyro."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help=f"default: {RESULTS}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together (default: 9)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="NAME", help=" ".join(STEPS))
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out, and measure nothing")
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> bool:
    """Run the steps and print the table -> whether no step failed or missed a target."""
    if options.markdown:
        print(to_markdown(read_results(options.out)))
        return True
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"bench/gpu.py: needs {', '.join(missing)}: install them, or give a folder of them in PYTHONPATH"
        )
    results = run_steps({name: STEPS[name] for name in options.steps}, options.out, 60 * options.minutes, options.toy)
    print(to_table(results))
    print(f"{options.out} has the results, {options.out.with_suffix('.md')} the table")
    return all(step["status"] == "ok" for step in results["steps"].values())


def run_steps(steps: dict[str, Step], out: Path, seconds: float, toy: bool) -> dict[str, Any]:
    """Run the steps one after the other for at most `seconds` -> the results, which are written after every step."""
    results: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit() or "",
        "command": shlex.join(["python", "bench/gpu.py", *sys.argv[1:]]),
        "toy": toy,
        "steps": {},
    }
    out = out.absolute()  # a step has another working directory
    deadline = time.monotonic() + seconds
    for name, step in steps.items():
        left = deadline - time.monotonic() - MARGIN
        if left < min(MIN_SECONDS, step.seconds):
            result = {"status": "skipped", "seconds": 0.0, "reason": f"{seconds / 60:g} minutes are over", "rows": []}
        else:
            print(f"{name} ...", flush=True)
            result = run_step(name, step, out, min(step.seconds, left), toy)
            print(f"{name}: {result['status']} in {result['seconds']:.0f} s {result['reason']}", flush=True)
        results["steps"][name] = result
        with atomic_text(out) as file:
            json.dump(results, file, indent=1, ensure_ascii=False)
        with atomic_text(out.with_suffix(".md")) as file:
            file.write(to_markdown(results) + "\n")
        if result.get("exit_status") == NO_GPU:
            raise UserError("bench/gpu.py: this machine has no CUDA GPU; give --toy to run everything at a tiny size")
    return results


def run_step(name: str, step: Step, out: Path, seconds: float, toy: bool) -> dict[str, Any]:
    """Run a step in a process -> its status, seconds, the reason of a failure, and its rows so far."""
    log = out.parent / LOGS / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=log.parent, ignore_cleanup_errors=True) as folder:
        rows = Path(folder) / "rows.jsonl"
        with open(log, "wb") as output:
            exit_status = run_process(step.command(rows, toy), Path(folder), output, seconds)
        result: dict[str, Any] = {
            "status": "ok" if exit_status == 0 else "timed out" if exit_status is None else "failed",
            "seconds": round(time.monotonic() - started, 1),
            "reason": "",
            "rows": read_rows(rows),
        }
    if exit_status != 0:
        tail = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()][-TAIL:]
        result |= {"reason": describe_exit(exit_status, seconds, tail), "exit_status": exit_status, "tail": tail}
    elif any(row["met"] is False for row in result["rows"]):
        result |= {"status": "missed", "reason": "a target was missed"}
    return result


def run_process(command: list[str], folder: Path, output: Any, seconds: float) -> int | None:
    """Run a command in a folder and a session of its own -> its exit status; None if it had to be killed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "MPLBACKEND": "Agg",
    }
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also after Ctrl-C, and for processes that the step has left behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver cannot be killed
            process.wait(MARGIN)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a step that may have been killed while it wrote one."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def describe_exit(status: int | None, seconds: float, tail: list[str]) -> str:
    """Why a step ended early, in one line."""
    if status is None:
        return f"killed after its {seconds:.0f} s"
    if status < 0:
        return f"crashed with {signal.Signals(-status).name}" + (", out of memory?" if status == -9 else "")
    return tail[-1] if tail else f"exit status {status}"


# ---- the table


def read_results(path: Path) -> dict[str, Any]:
    """The results of an earlier command. Raises UserError if there are none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no results there ({error}); measure them with: python bench/gpu.py") from None


def table_rows(results: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """(step, what, value, target, note) of everything that was measured, and of what was not."""
    for name, step in results["steps"].items():
        for row in step["rows"]:
            met = {True: "met", False: "MISSED", None: ""}[row["met"]]
            target = " ".join(filter(None, [row["target"], met]))
            yield name, row["what"], f"{format_value(row['value'])} {row['unit']}".strip(), target, row["note"]
        if step["status"] not in ("ok", "missed"):
            yield name, step["status"], "", "", step["reason"]


def format_value(value: Any) -> str:
    """A number with about four digits; anything else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def to_table(results: dict[str, Any]) -> str:
    """The results in columns."""
    rows = [("step", "what", "value", "target", "note"), *table_rows(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows]
    return "\n".join(lines)


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a page of bench/results/, without the commentary that only a person can write."""
    toy = ", at toy size on a CPU: nothing of it is a measurement" if results["toy"] else ""
    lines = [
        f"{results['started']}, commit {results['commit']}: `{results['command']}`{toy}",
        "",
        "| step | what | measured | target | note |",
        "|---|---|---|---|---|",
    ]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in table_rows(results))
    lines += [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join(lines)


# ---- in the process of a step


def run_child(function: str, rows: str, toy: str) -> int:
    """Run a step's function and write each of its rows at once -> the exit status."""
    module, name = function.split(":")
    try:
        step = getattr(importlib.import_module(module), name)
        from gpu_steps.common import make_setting

        gc.freeze()  # collecting garbage need not search the imported modules, which takes 0.2 s
        with open(rows, "a", encoding="utf-8") as file:
            for row in step(make_setting(toy == "1", Path.cwd())):
                file.write(json.dumps(row._asdict(), ensure_ascii=False) + "\n")
                file.flush()
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in OPTIONAL:
            raise
        return write_missing(rows, error)
    except UserError as error:
        print(error)
        return NO_GPU if "--device cuda" in str(error) else 1
    finally:
        gc.unfreeze()
    return 0


def write_missing(rows: str, error: ModuleNotFoundError) -> int:
    """Record that a step needs a package that is not installed -> the exit status."""
    row = {"what": "all", "value": "not available", "unit": "", "target": "", "met": None}
    with open(rows, "a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "note": f"needs the package {error.name}"}) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(run_child(*sys.argv[2:]))
    try:
        sys.exit(not main(parse_arguments()))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the results of the finished steps are kept")
