"""METEOR and SPICE, which are Java programs: where they cannot run, the score is a text that says why.

pycocoevalcap brings METEOR 1.5 whole; SPICE also needs Stanford CoreNLP, which is fetched once.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from pycocoevalcap.meteor import meteor
from pycocoevalcap.spice import get_stanford_models, spice

SECONDS = 600  # a METEOR that does not answer for so long is ended; first it reads its tables, 10 of work
METEOR = (
    *("java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(Path(meteor.__file__).with_name(meteor.METEOR_JAR))),
    *("-", "-", "-stdio", "-l", "en", "-norm"),
)
SPICE = Path(spice.__file__).with_name(spice.SPICE_JAR)
CORENLP = Path(spice.__file__).parent / get_stanford_models.SPICELIB / f"{get_stanford_models.JAR}.jar"

Captions = Mapping[str, Sequence[str]]
References = Mapping[str, Sequence[Sequence[str]]]


def meteor_score(candidates: Captions, references: References) -> float | str:
    """METEOR 1.5 times 100, in its English setting, or why it was skipped: "skipped: ..."."""
    if not shutil.which("java"):
        return "skipped: METEOR needs Java, and there is none on this machine"
    questions = [
        " ||| ".join(["SCORE", *map(_meteor_text, [*references[photo], words])]) for photo, words in candidates.items()
    ]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        try:
            return 100 * _ask_meteor(questions, complaints)
        except (OSError, ValueError) as error:
            complaints.seek(0)
            reason = " ".join(complaints.read().split()) or str(error)
            return f"skipped: METEOR did not run ({reason[:200]})"


def spice_score(candidates: Captions, references: References) -> float | str:
    """SPICE (Anderson et al. 2016) times 100, or why it was skipped."""
    if not shutil.which("java"):
        return "skipped: SPICE needs Java, and there is none on this machine"
    if not CORENLP.exists():
        command = "python -m pycocoevalcap.spice.get_stanford_models"
        return f"skipped: SPICE needs Stanford CoreNLP, which is not there; fetch it once: {command}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            return 100 * _ask_spice(candidates, references, Path(folder))
        except subprocess.CalledProcessError as error:
            return f"skipped: SPICE did not run ({' '.join(error.stderr.split())[:200]})"
        except (OSError, ValueError) as error:
            return f"skipped: SPICE did not run ({str(error)[:200]})"


def _ask_spice(candidates: Captions, references: References, folder: Path) -> float:
    """The mean F of the photos. (pycocoevalcap's own way of asking writes beside its code.)"""
    asked = [
        {"image_id": photo, "test": " ".join(words), "refs": [" ".join(reference) for reference in references[photo]]}
        for photo, words in candidates.items()
    ]
    (folder / "asked.json").write_text(json.dumps(asked), "utf-8")
    (folder / "cache").mkdir()
    command = (
        "java",
        "-Xmx8G",
        "-jar",
        SPICE,
        folder / "asked.json",
        "-cache",
        folder / "cache",
        "-out",
        folder / "answer.json",
        "-subset",
        "-silent",
    )
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=SPICE.parent)
    answer = json.loads((folder / "answer.json").read_text("utf-8"))
    return statistics.fmean(photo["scores"]["All"]["f"] for photo in answer)


def _meteor_text(words: Sequence[str]) -> str:
    """METEOR's own separator would end the caption; an empty caption is scored as one."""
    return " ".join(" ".join(words).replace("|||", "").split())


def _ask_meteor(questions: list[str], complaints: IO[str]) -> float:
    """The corpus score. METEOR answers each question with a line of statistics; all of them together with a line for
    each and, last, the corpus score. (pycocoevalcap's own way of asking waits for ever where Java fails.)"""
    with subprocess.Popen(
        METEOR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, encoding="utf-8"
    ) as java:
        try:
            counts = []
            for question in questions:
                print(question, file=java.stdin, flush=True)
                counts.append(_answer(java))
            print("EVAL", *counts, sep=" ||| ", file=java.stdin, flush=True)
            scores = [float(_answer(java)) for _ in range(len(questions) + 1)]
            return scores[-1]
        finally:
            java.kill()


def _answer(java: subprocess.Popen) -> str:
    """Its next line. A Java that is silent for too long is ended; ValueError where it has ended."""
    clock = threading.Timer(SECONDS, java.kill)
    clock.start()
    try:
        answer = java.stdout.readline().strip()
        if not answer:
            java.wait()
    finally:
        clock.cancel()
    if not answer:
        raise ValueError(f"it gave no answer (exit status {java.returncode})")
    return answer
