"""Scores equal coco-caption's, and the formulae of their papers written out."""

import math
import os
import shutil
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioning import metrics
from captioning.metrics import by_character, format_table, function_word_endings, score, score_table
from preprocess.annotations import read_annotations
from preprocess.tokenizers import tokenize

PURE = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")
caption = st.lists(st.sampled_from("abcde"), min_size=1, max_size=8)
corpus = st.lists(st.tuples(caption, st.lists(caption, min_size=1, max_size=4)), min_size=1, max_size=6)


def split(pairs):
    return {str(i): c for i, (c, _) in enumerate(pairs)}, {str(i): r for i, (_, r) in enumerate(pairs)}


@settings(max_examples=40)
@given(corpus)
def test_scores_equal_coco_captions_scorers(pairs):
    candidates, references = split(pairs)
    theirs = {k: [" ".join(v)] for k, v in candidates.items()}
    ours = {k: [" ".join(r) for r in v] for k, v in references.items()}
    expected = [*Bleu(4).compute_score(ours, theirs, verbose=0)[0], Rouge().compute_score(ours, theirs)[0],
                Cider().compute_score(ours, theirs)[0]]  # fmt: skip
    found = score(candidates, references, only=PURE)
    assert [found[name] for name in PURE] == pytest.approx([100 * value for value in expected], abs=1e-6)


def grams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def plain_cider_d(candidates, references):
    """Vedantam et al. 2015, CIDEr-D: clipped tf-idf cosine with a Gaussian penalty of the length, times 10."""
    frequency = Counter(
        g for refs in references.values() for g in {g for r in refs for n in range(1, 5) for g in grams(r, n)}
    )
    log_photos = math.log(len(references))

    def vector(words, n):
        return {g: count * (log_photos - math.log(max(1, frequency[g]))) for g, count in grams(words, n).items()}

    def similarity(c, r, n):
        a, b = vector(c, n), vector(r, n)
        norm = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
        dot = sum(min(v, b.get(g, 0)) * b.get(g, 0) for g, v in a.items())
        # coco-caption takes the length from the bigrams
        gap = max(0, len(c) - 1) - max(0, len(r) - 1)
        return (dot / norm if norm else 0) * math.exp(-(gap**2) / (2 * 6.0**2))

    values = [
        sum(sum(similarity(c, r, n) for n in range(1, 5)) / 4 for r in references[k]) / len(references[k]) * 10
        for k, c in candidates.items()
    ]
    return sum(values) / len(values)


@settings(max_examples=30)
@given(corpus)
def test_cider_d_is_the_papers_formula(pairs):
    candidates, references = split(pairs)
    found = score(candidates, references, only=("CIDEr-D",))["CIDEr-D"]
    assert found == pytest.approx(100 * plain_cider_d(candidates, references), abs=1e-6)


def plain_bleu(candidates, references, order):
    """Papineni et al. 2002, over the corpus; the reference nearest in length, the shorter of two. 1e-15 and 1e-9 are
    coco-caption's guards against a division by zero: they show where no n-gram matches, or none is there."""
    logs, length, nearest = 0.0, 0, 0
    for n in range(1, order + 1):
        right = total = 0
        for photo, words in candidates.items():
            most = Counter()
            for reference in references[photo]:
                most |= grams(reference, n)
            right += (grams(words, n) & most).total()
            total += max(0, len(words) - n + 1)
        logs += math.log((right + 1e-15) / (total + 1e-9))
    for photo, words in candidates.items():
        length += len(words)
        nearest += min((abs(len(r) - len(words)), len(r)) for r in references[photo])[1]
    return math.exp(logs / order + min(0, 1 - nearest / length))


def plain_rouge_l(candidates, references):
    """Lin 2004 with beta 1.2: the best precision and the best recall, even of different references."""

    def common(a, b):
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + common(a[1:], b[1:])
        return max(common(a[1:], b), common(a, b[1:]))

    values = []
    for photo, words in candidates.items():
        precision = max(common(words, r) / len(words) for r in references[photo])
        recall = max(common(words, r) / len(r) for r in references[photo])
        values.append(2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0)
    return sum(values) / len(values)


@settings(max_examples=30)
@given(corpus)
def test_bleu_is_the_papers_formula_also_on_short_captions(pairs):
    candidates, references = split(pairs)
    found = score(candidates, references, only=PURE[:4])
    for order in (1, 2, 3, 4):
        assert found[f"BLEU-{order}"] == pytest.approx(100 * plain_bleu(candidates, references, order), abs=1e-5)


@settings(max_examples=30)
@given(corpus)
def test_rouge_l_is_the_papers_formula(pairs):
    candidates, references = split(pairs)
    found = score(candidates, references, only=("ROUGE-L",))["ROUGE-L"]
    assert found == pytest.approx(100 * plain_rouge_l(candidates, references), abs=1e-6)


long_caption = st.lists(st.sampled_from("ab"), min_size=4, max_size=9)


@settings(max_examples=30)
@given(st.lists(st.tuples(long_caption, st.lists(long_caption, min_size=1, max_size=3)), min_size=3, max_size=6))
def test_bleu_equals_nltks_on_captions_of_four_words_or_more(pairs):
    candidates, references = split(pairs)
    found = score(candidates, references, only=("BLEU-1", "BLEU-2"))
    for n, weights in ((1, (1,)), (2, (0.5, 0.5))):
        theirs = corpus_bleu(list(references.values()), list(candidates.values()), weights)
        assert found[f"BLEU-{n}"] == pytest.approx(100 * theirs, abs=1e-4)


def test_a_perfect_caption_scores_a_hundred():
    words = "a dog runs on the grass".split()
    found = score(
        {"1": words, "2": ["a", "cat", "sits", "down"]}, {"1": [words], "2": [["a", "cat", "sits", "down"]]}, only=PURE
    )
    assert [found[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx([100] * 4)
    assert found["ROUGE-L"] == pytest.approx(100)


@given(corpus)
@settings(max_examples=10)
def test_the_order_of_photos_does_not_matter(pairs):
    candidates, references = split(pairs)
    backwards = dict(reversed(candidates.items()))
    assert score(candidates, references, only=PURE) == pytest.approx(score(backwards, references, only=PURE))


def test_empty_captions_count_as_wrong_and_do_not_fail():
    found = score({"1": [], "2": ["a", "dog"]}, {"1": [["a"]], "2": [["a", "dog"]]}, only=PURE)
    assert 0 < found["BLEU-1"] < 100


def test_references_of_other_photos_do_not_count():
    candidates = {"1": ["a", "dog"], "2": ["a", "cat"]}
    references = {"1": [["a", "dog", "runs"]], "2": [["a", "cat"], ["cats"]]}
    more = {**references, "3": [["a", "dog"]]}
    assert score(candidates, more, only=PURE) == score(candidates, references, only=PURE)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no captions"):
        score({}, {})
    with pytest.raises(ValueError, match="photo7"):
        score({"photo7": ["a"]}, {})
    with pytest.raises(ValueError, match="photo8"):
        score({"photo7": ["a"], "photo8": ["a"]}, {"photo7": [["a"]], "photo8": [[]]})
    with pytest.raises(ValueError, match="not one word"):
        score({"1": ["a dog"]}, {"1": [["a"]]})


def test_chinese_is_scored_by_word_and_by_character():
    table = score_table({"1": ["两只", "狗", "在", "奔跑"]}, {"1": [["两只", "小狗", "在", "奔跑"]]}, "zh", "jieba")
    assert table["character"]["BLEU-1"] > table["word"]["BLEU-1"] > 0
    text = format_table(table)
    assert "by character" in text and "jieba" in text and "skipped: METEOR has no Chinese" in text


def test_captions_that_break_off_at_a_function_word_are_counted_beside_the_references():
    candidates = {"1": "a man on a".split(), "2": "a dog on the grass".split(), "3": [], "4": "dogs with".split()}
    references = {photo: [["a", "dog"], ["a", "dog", "and"]] for photo in candidates}
    table = score_table(candidates, references, "en", "whitespace")
    assert table["function_word_endings"] == {"captions": 0.5, "references": 0.5}
    assert "50.0% of the captions end in a function word" in format_table(table)
    assert function_word_endings([["一个", "男人", "穿着"], ["狗", "在", "草地", "上"]], "zh") == 0.5


@pytest.mark.parametrize(
    "file, language, tokenizer, most",
    [("dataset_flickr8k.json", "en", "whitespace", 0.007), ("caption_val_annotations_zh.json", "zh", "jieba", 0.0012)],
)
def test_people_hardly_ever_end_a_caption_in_a_function_word(shared, file, language, tokenizer, most):
    flickr = shared / "flickr8k"
    records = read_annotations(flickr / file, flickr / "images", "val" if language == "zh" else None)[-1000:]
    captions = [tokenize(caption, tokenizer) for record in records for caption in record.captions]
    assert 0 < function_word_endings(captions, language) < most


def test_characters_do_not_depend_on_how_the_words_were_cut_and_latin_runs_stay_whole():
    expected = ["穿", "NBA", "球", "衣", "的", "23", "人"]
    assert by_character(["穿", "NBA", "球衣", "的", "23", "人"]) == expected
    assert by_character(["穿", "NBA球", "衣的", "2", "3人"]) == expected


def test_meteor_is_skipped_with_a_reason_where_there_is_no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "needs Java" in score({"1": ["a"]}, {"1": [["a"]]})["METEOR"]


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
    monkeypatch.setattr(metrics, "METEOR_SECONDS", 0.5)
    before = time.monotonic()
    found = score({str(i): ["a"] for i in range(50)}, {str(i): [["a"]] for i in range(50)}, only=("METEOR",))
    assert found["METEOR"].startswith(f"skipped: METEOR did not run ({reason}") and not found["METEOR"].endswith("()")
    assert time.monotonic() - before < 30


@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_meteor_is_coco_captions_also_with_an_empty_caption():
    """The number is what pycocoevalcap 1.2.0's Meteor().compute_score gives: asking it too would take twice as long."""
    candidates = {"1": "a dog runs on grass".split(), "2": "two men ||| walk".split(), "3": []}
    references = {"1": ["a dog is running on the grass".split(), "a dog".split()], "2": ["two men are walking".split()],
                  "3": [["a"], ["a", "cat"]]}  # fmt: skip
    assert score(candidates, references, only=("METEOR",))["METEOR"] == pytest.approx(27.791689426753485, abs=1e-6)
