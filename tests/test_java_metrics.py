"""METEOR and SPICE: coco-caption's numbers if Java is installed, and a reason if they cannot run."""

import os
import shutil
import sys
import time

import pytest

from captioning.evaluation import java_metrics
from captioning.evaluation.java_metrics import meteor_score, spice_score


def test_without_java_meteor_is_skipped_with_a_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "needs Java" in meteor_score({"1": ["a"]}, {"1": [["a"]]})


@pytest.mark.skipif(os.name != "posix", reason="the fake Java is a shell script")
@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo 'Error: Unable to access jarfile' >&2; exit 1", "Error: Unable to access jarfile"),
        ("exit 1", ""),  # a broken pipe or no answer, whichever is noticed first
        ("while read -r line; do echo nonsense; done", "it answered 'nonsense' instead of a number"),
        ("exec /bin/sleep 60", "it gave no answer"),
    ],
    ids=["fails", "exits without output", "prints nonsense", "hangs"],
)
def test_meteor_is_skipped_with_a_reason_if_java_fails(script, reason, tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(java_metrics, "TIMEOUT", 0.5)
    start = time.monotonic()
    found = meteor_score({str(i): ["a"] for i in range(50)}, {str(i): [["a"]] for i in range(50)})
    assert found.startswith(f"skipped: METEOR did not run ({reason}") and not found.endswith("()")
    assert time.monotonic() - start < 30


# Of the three captions below: what METEOR 1.5 is asked, and what it answers.
STATISTICS = (
    "5.0 2.0 2.0 1.0 1.0 1.0 1.0 1.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 1.0 2.0 2.0",
    "3.0 4.0 1.0 2.0 1.0 1.0 1.0 1.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 1.0 2.0 2.0",
    "0.0 1.0 0.0 1.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0",
)
RECORDED = {
    "SCORE ||| a dog is running on the grass ||| a dog ||| a dog runs on grass": STATISTICS[0],
    "SCORE ||| two men are walking ||| two men walk": STATISTICS[1],
    "SCORE ||| a ||| a cat ||| ": STATISTICS[2],
    " ||| ".join(["EVAL", *STATISTICS]): "0.3783522075424361\n0.24339855389672638\n0.0\n0.27791689426753485",
}
REPLAY = f"""
import sys
assert sys.argv[-4:] == ["-stdio", "-l", "en", "-norm"]
for line in sys.stdin:
    print({RECORDED}[line.rstrip(chr(10))], flush=True)
"""


def put_java(folder, monkeypatch, script):
    """Put a program in Python in the place of Java."""
    java = folder / "java"
    java.write_text(f"#!{sys.executable}\n{script}")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return java


@pytest.mark.skipif(os.name != "posix", reason="the fake Java is a script")
def test_meteor_equals_coco_captions_also_with_an_empty_caption(tmp_path, monkeypatch, times):
    """The number is the result of pycocoevalcap 1.2.0's Meteor().compute_score.

    In the suite, a recording answers for Java, which takes 10 CPU seconds to start.
    """
    if times(True, False):
        put_java(tmp_path, monkeypatch, REPLAY)
    elif not shutil.which("java"):
        pytest.skip("METEOR needs Java")
    candidates = {"1": "a dog runs on grass".split(), "2": "two men ||| walk".split(), "3": []}
    references = {
        "1": ["a dog is running on the grass".split(), "a dog".split()],
        "2": ["two men are walking".split()],
        "3": [["a"], ["a", "cat"]],
    }
    assert meteor_score(candidates, references) == pytest.approx(27.791689426753485, abs=1e-6)


def test_without_java_or_its_parser_spice_is_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(java_metrics, "CORENLP_JAR", tmp_path / "none.jar")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs Java" in spice_score({"1": ["a"]}, {"1": [["a"]]})
    monkeypatch.setattr(shutil, "which", lambda name: "java")
    assert "download it once: python -m pycocoevalcap.spice.get_stanford" in spice_score({"1": ["a"]}, {"1": [["a"]]})


# A fake SPICE: the F-score of a photo is the fraction of the candidate's words that its first reference contains.
FAKE_SPICE = """
import json, sys
photos = json.load(open(sys.argv[sys.argv.index("-cache") - 1]))
f = [len(set(a["test"].split()) & set(a["refs"][0].split())) / len(a["test"].split()) for a in photos]
answer = [{"image_id": a["image_id"], "scores": {"All": {"f": value}}} for a, value in zip(photos, f)]
json.dump(answer, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


@pytest.mark.skipif(os.name != "posix", reason="the fake Java is a script")
@pytest.mark.parametrize(
    "script, expected",
    [
        (FAKE_SPICE, 75.0),
        ("import sys; sys.exit('Exception in thread main')", "skipped: SPICE did not run (Exception in"),
        ("", "skipped: SPICE did not run ("),
    ],
)
def test_spice_is_the_mean_of_javas_scores_or_a_reason(script, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(java_metrics, "CORENLP_JAR", put_java(tmp_path, monkeypatch, script))
    found = spice_score({"1": ["a", "dog"], "2": ["cats"]}, {"1": [["a", "cat"], ["dog"]], "2": [["cats"]]})
    assert found == expected if isinstance(expected, float) else found.startswith(expected)
