"""METEOR and SPICE: coco-caption's numbers where Java is, and a reason where they cannot run."""

import os
import shutil
import sys
import time

import pytest

from captioning.evaluation import java_metrics
from captioning.evaluation.java_metrics import meteor_score, spice_score


def test_meteor_is_skipped_with_a_reason_where_there_is_no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "needs Java" in meteor_score({"1": ["a"]}, {"1": [["a"]]})


@pytest.mark.skipif(os.name != "posix", reason="the false Java is a shell script")
@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo 'Error: Unable to access jarfile' >&2; exit 1", "Error: Unable to access jarfile"),
        ("exit 1", ""),  # a broken pipe or no answer: whichever is seen first
        ("while read -r line; do echo nonsense; done", "could not convert string to float: 'nonsense'"),
        ("exec /bin/sleep 60", "it gave no answer"),
    ],
    ids=["fails", "says nothing", "talks nonsense", "hangs"],
)
def test_meteor_is_skipped_with_a_reason_where_java_does_not_work(script, reason, tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(java_metrics, "SECONDS", 0.5)
    before = time.monotonic()
    found = meteor_score({str(i): ["a"] for i in range(50)}, {str(i): [["a"]] for i in range(50)})
    assert found.startswith(f"skipped: METEOR did not run ({reason}") and not found.endswith("()")
    assert time.monotonic() - before < 30


@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_meteor_is_coco_captions_also_with_an_empty_caption():
    """The number is what pycocoevalcap 1.2.0's Meteor().compute_score gives: asking it too would take twice as long."""
    candidates = {"1": "a dog runs on grass".split(), "2": "two men ||| walk".split(), "3": []}
    references = {
        "1": ["a dog is running on the grass".split(), "a dog".split()],
        "2": ["two men are walking".split()],
        "3": [["a"], ["a", "cat"]],
    }
    assert meteor_score(candidates, references) == pytest.approx(27.791689426753485, abs=1e-6)


def test_spice_is_skipped_with_a_reason_where_java_or_its_parser_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(java_metrics, "CORENLP", tmp_path / "none.jar")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs Java" in spice_score({"1": ["a"]}, {"1": [["a"]]})
    monkeypatch.setattr(shutil, "which", lambda name: "java")
    assert "fetch it once: python -m pycocoevalcap.spice.get_stanford" in spice_score({"1": ["a"]}, {"1": [["a"]]})


# A false SPICE: the F of a photo is the share of the candidate's words that its first reference has.
SPICE = """
import json, sys
asked = json.load(open(sys.argv[sys.argv.index("-cache") - 1]))
f = [len(set(a["test"].split()) & set(a["refs"][0].split())) / len(a["test"].split()) for a in asked]
answer = [{"image_id": a["image_id"], "scores": {"All": {"f": value}}} for a, value in zip(asked, f)]
json.dump(answer, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


@pytest.mark.skipif(os.name != "posix", reason="the false Java is a script")
@pytest.mark.parametrize(
    "script, expected",
    [
        (SPICE, 75.0),
        ("import sys; sys.exit('Exception in thread main')", "skipped: SPICE did not run (Exception in"),
        ("", "skipped: SPICE did not run ("),
    ],
)
def test_spice_is_the_mean_of_what_java_answers_or_a_reason(script, expected, tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text(f"#!{sys.executable}\n{script}")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(java_metrics, "CORENLP", java)
    found = spice_score({"1": ["a", "dog"], "2": ["cats"]}, {"1": [["a", "cat"], ["dog"]], "2": [["cats"]]})
    assert found == expected if isinstance(expected, float) else found.startswith(expected)
