"""BLEU-1..4, ROUGE-L and CIDEr-D as coco-caption defines them, on words that are already cut; METEOR where it can run.

The scorers are pycocoevalcap's, the Python of coco-caption itself. (nltk's corpus_bleu is not the same on short
captions: it counts at least one n-gram in each.) All scores are times 100: corpus BLEU without smoothing, CIDEr-D with
the document frequencies of the references given. References are the words themselves, not their <unk> version.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor
from pycocoevalcap.rouge.rouge import Rouge

NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D", "METEOR")
# Words that a caption hardly ever ends in: of Flickr8k's 35,000 captions 0.6 % in English and 0.1 % in Chinese do.
# Words that may well end one, such as by, over or 上 (on), are not among them.
FUNCTION_WORDS = {
    "en": frozenset("a an the this that his their its in on at of with for to from into onto near through under and or "
                    "while as is are was were am be".split()),
    "zh": frozenset("的 地 得 在 和 与 及 跟 把 被 给 对 从 向 往 于 是 有 穿 穿着 正在 个 只 条 名 位 "
                    "一个 一只 一条 一名 一位 一群 一件 一辆 一张 两个 两只 几个".split()),
}  # fmt: skip
METEOR_SECONDS = 600  # a Java that does not answer for so long is ended; first it reads its tables, 10 of work
METEOR = (
    *("java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(Path(meteor.__file__).with_name(meteor.METEOR_JAR))),
    *("-", "-", "-stdio", "-l", "en", "-norm"),
)

Captions = Mapping[str, Sequence[str]]
References = Mapping[str, Sequence[Sequence[str]]]


def score(
    candidates: Captions, references: References, language: str = "en", only: Sequence[str] = NAMES
) -> dict[str, float | str]:
    """Scores times 100, of one caption (words) a photo against one or more references (words) of the same photo.

    candidates may be empty captions. `only` names the scores wanted. METEOR may be a text: "skipped: ...".
    Raises ValueError without candidates, for a photo without a reference that has words, and for a word with a space.
    """
    assert set(only) <= set(NAMES), only
    theirs = {photo: [_joined(words)] for photo, words in candidates.items()}
    if not theirs:
        raise ValueError("no captions to score")
    alone = [photo for photo in theirs if not any(references.get(photo, ()))]
    if alone:
        raise ValueError(f"no references for {alone[0]}")
    ours = {photo: [_joined(words) for words in references[photo]] for photo in theirs}
    scores: dict[str, float | str] = {}
    if any(name.startswith("BLEU") for name in only):
        bleu, _ = Bleu(4).compute_score(ours, theirs, verbose=0)
        scores |= {f"BLEU-{n}": 100 * value for n, value in enumerate(bleu, 1)}
    if "ROUGE-L" in only:
        scores["ROUGE-L"] = 100 * float(Rouge().compute_score(ours, theirs)[0])
    if "CIDEr-D" in only:
        scores["CIDEr-D"] = 100 * float(Cider().compute_score(ours, theirs)[0])
    if "METEOR" in only:
        scores["METEOR"] = _meteor(ours, theirs, language)
    return {name: scores[name] for name in NAMES if name in only}


def score_table(candidates: Captions, references: References, language: str, tokenizer: str) -> dict:
    """The scores by word and, for Chinese, by character: how a text is cut moves CIDEr-D by a factor of two."""
    table = {"photos": len(candidates), "tokenizer": tokenizer, "word": score(candidates, references, language)}
    all_references = [words for photo in candidates for words in references[photo]]
    table["function_word_endings"] = {
        "captions": function_word_endings(list(candidates.values()), language),
        "references": function_word_endings(all_references, language),
    }
    if language == "zh":
        table["character"] = score(
            {photo: by_character(words) for photo, words in candidates.items()},
            {photo: [by_character(words) for words in references[photo]] for photo in candidates},
            language,
        )
    return table


def format_table(table: dict) -> str:
    """A score table for a person, with how the numbers were made."""
    rows = [unit for unit in ("word", "character") if unit in table]
    lines = [" " * 12 + "".join(f"{name:>9}" for name in NAMES)]
    for unit in rows:
        values = [table[unit][name] for name in NAMES]
        cells = [f"{value:9.1f}" if isinstance(value, float) else f"{'-':>9}" for value in values]
        lines.append(f"by {unit:<9}" + "".join(cells))
    meteor_or_why = table["word"]["METEOR"]
    note = f"; METEOR {meteor_or_why}" if isinstance(meteor_or_why, str) else ""
    lines.append(f"{table['photos']:,} photos, words by {table['tokenizer']}; times 100, corpus BLEU unsmoothed, "
                 f"references are the words themselves, not their <unk> version{note}")  # fmt: skip
    endings = table["function_word_endings"]
    lines.append(f"{endings['captions']:.1%} of the captions end in a function word, such as a or 的; "
                 f"{endings['references']:.1%} of the references do")  # fmt: skip
    return "\n".join(lines)


def function_word_endings(captions: Sequence[Sequence[str]], language: str) -> float:
    """The share of captions (words) that break off at a function word: what CIDEr optimisation is known to teach."""
    return sum(bool(words) and words[-1] in FUNCTION_WORDS[language] for words in captions) / len(captions)


def by_character(words: Sequence[str]) -> list[str]:
    """The same caption cut in characters; a run of Latin letters or digits stays one."""
    return re.findall(r"[0-9A-Za-z]+|\S", "".join(words))


def _joined(words: Sequence[str]) -> str:
    for word in words:
        if not word or word.split() != [word]:
            raise ValueError(f"{word!r} is not one word")
    return " ".join(words)


def _meteor(ours: dict[str, list[str]], theirs: dict[str, list[str]], language: str) -> float | str:
    """METEOR 1.5 times 100, or why it was skipped."""
    if language != "en":
        return "skipped: METEOR has no Chinese"
    if not shutil.which("java"):
        return "skipped: METEOR needs Java, and there is none on this machine"
    questions = [" ||| ".join(["SCORE", *map(_meteor_text, ours[photo] + theirs[photo])]) for photo in theirs]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        try:
            return 100 * _ask_meteor(questions, complaints)
        except (OSError, ValueError) as error:
            complaints.seek(0)
            reason = " ".join(complaints.read().split()) or str(error)
            return f"skipped: METEOR did not run ({reason[:200]})"


def _meteor_text(text: str) -> str:
    """METEOR's own separator would end the caption; an empty caption is scored as one."""
    return " ".join(text.replace("|||", "").split())


def _ask_meteor(questions: list[str], complaints: IO[str]) -> float:
    """The corpus score. METEOR answers each question with a line of statistics; all of them together with a line for
    each and, last, the corpus score. (pycocoevalcap's own way of asking waits for ever where Java fails.)"""
    with subprocess.Popen(
        METEOR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, encoding="utf-8"
    ) as java:
        try:
            statistics = []
            for question in questions:
                print(question, file=java.stdin, flush=True)
                statistics.append(_answer(java))
            print("EVAL", *statistics, sep=" ||| ", file=java.stdin, flush=True)
            scores = [float(_answer(java)) for _ in range(len(questions) + 1)]
            return scores[-1]
        finally:
            java.kill()


def _answer(java: subprocess.Popen) -> str:
    """Its next line. A Java that is silent for too long is ended; ValueError where it has ended."""
    clock = threading.Timer(METEOR_SECONDS, java.kill)
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
