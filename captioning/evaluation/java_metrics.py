"""METEOR and SPICE, which are Java programs. If one cannot run, its score is a text with the reason.

pycocoevalcap includes METEOR 1.5; SPICE also needs Stanford CoreNLP, which is downloaded once.

    METEOR  Denkowski and Lavie 2014, https://aclanthology.org/W14-3348/
    SPICE   Anderson et al. 2016, https://arxiv.org/abs/1607.08822
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pycocoevalcap.meteor import meteor
from pycocoevalcap.spice import get_stanford_models, spice

from captioning.evaluation.metrics import Captions, References
from captioning.runtime.library_errors import reason

TIMEOUT = 600  # seconds for one answer of METEOR; loading its tables takes about 10
METEOR_COMMAND = (
    *("java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(Path(meteor.__file__).with_name(meteor.METEOR_JAR))),
    *("-", "-", "-stdio", "-l", "en", "-norm"),
)
SPICE_JAR = Path(spice.__file__).with_name(spice.SPICE_JAR)
CORENLP_JAR = Path(spice.__file__).parent / get_stanford_models.SPICELIB / f"{get_stanford_models.JAR}.jar"


def meteor_score(candidates: Captions, references: References) -> float | str:
    """Compute METEOR 1.5, English setting, times 100. If it cannot run, return "skipped: " and the reason."""
    if not shutil.which("java"):
        return "skipped: METEOR needs Java, which is not installed"
    requests = []
    for photo, words in candidates.items():
        captions = [*references[photo], words]
        requests.append(" ||| ".join(["SCORE", *map(_meteor_text, captions)]))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        try:
            return 100 * _run_meteor(requests, stderr)
        except (OSError, ValueError) as error:
            stderr.seek(0)
            return f"skipped: METEOR did not run ({_one_line(stderr.read()) or reason(error)})"


def spice_score(candidates: Captions, references: References) -> float | str:
    """Compute SPICE times 100. If it cannot run, return "skipped: " and the reason."""
    if not shutil.which("java"):
        return "skipped: SPICE needs Java, which is not installed"
    if not CORENLP_JAR.exists():
        command = "python -m pycocoevalcap.spice.get_stanford_models"
        return f"skipped: SPICE needs Stanford CoreNLP, which is not installed; download it once: {command}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            return 100 * _run_spice(candidates, references, Path(folder))
        except subprocess.CalledProcessError as error:
            return f"skipped: SPICE did not run ({_one_line(error.stderr)})"
        except (OSError, ValueError) as error:
            return f"skipped: SPICE did not run ({reason(error)})"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _meteor_text(words: Sequence[str]) -> str:
    """Join the words without METEOR's separator, which would end the caption. An empty caption is scored as one."""
    return " ".join(" ".join(words).replace("|||", "").split())


def _run_meteor(requests: list[str], stderr: IO[str]) -> float:
    """Return the corpus score. Raises OSError or ValueError if Java fails.

    METEOR answers each SCORE request with a line of statistics. It answers EVAL with all of these lines by one score
    per caption and, last, the corpus score. (pycocoevalcap's own Meteor class waits for ever if Java fails.)
    """
    with subprocess.Popen(
        METEOR_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8"
    ) as java:
        assert java.stdin is not None
        try:
            statistics_lines = []
            for request in requests:
                print(request, file=java.stdin, flush=True)
                statistics_lines.append(_read_line(java))
            print("EVAL", *statistics_lines, sep=" ||| ", file=java.stdin, flush=True)
            scores = [_read_number(java) for _ in range(len(requests) + 1)]
            return scores[-1]
        finally:
            java.kill()


def _read_number(java: subprocess.Popen[str]) -> float:
    line = _read_line(java)
    try:
        return float(line)
    except ValueError:
        raise ValueError(f"it answered {line!r} instead of a number") from None


def _read_line(java: subprocess.Popen[str]) -> str:
    """Read a line of output; kill a process that is silent for TIMEOUT. Raises ValueError if the process has ended."""
    assert java.stdout is not None
    timer = threading.Timer(TIMEOUT, java.kill)
    timer.start()
    try:
        line = java.stdout.readline().strip()
        if not line:
            java.wait()
    finally:
        timer.cancel()
    if not line:
        raise ValueError(f"it gave no answer (exit status {java.returncode})")
    return line


def _run_spice(candidates: Captions, references: References, folder: Path) -> float:
    """Return the mean F-score of the photos. (pycocoevalcap's own Spice class writes into its package.)"""
    captions = [
        {"image_id": photo, "test": " ".join(words), "refs": [" ".join(reference) for reference in references[photo]]}
        for photo, words in candidates.items()
    ]
    captions_file = folder / "captions.json"
    scores_file = folder / "scores.json"
    cache = folder / "cache"
    captions_file.write_text(json.dumps(captions), "utf-8")
    cache.mkdir()
    command: list[str | Path] = ["java", "-Xmx8G", "-jar", SPICE_JAR, captions_file]
    command += ["-cache", cache, "-out", scores_file, "-subset", "-silent"]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=SPICE_JAR.parent)
    scores = json.loads(scores_file.read_text("utf-8"))
    return statistics.fmean(photo["scores"]["All"]["f"] for photo in scores)
