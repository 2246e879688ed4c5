"""Scores equal coco-caption's, and the formulae of their papers written out."""

import math
import shutil
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioning.metrics import by_character, format_table, score, score_table

PURE = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")
caption = st.lists(st.sampled_from("abcde"), min_size=1, max_size=8)
corpus = st.lists(st.tuples(caption, st.lists(caption, min_size=1, max_size=4)), min_size=2, max_size=6)


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


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="no captions"):
        score({}, {})
    with pytest.raises(ValueError, match="photo7"):
        score({"photo7": ["a"]}, {})
    with pytest.raises(ValueError, match="not one word"):
        score({"1": ["a dog"]}, {"1": [["a"]]})


def test_chinese_is_scored_by_word_and_by_character():
    table = score_table({"1": ["两只", "狗", "在", "奔跑"]}, {"1": [["两只", "小狗", "在", "奔跑"]]}, "zh", "jieba")
    assert table["character"]["BLEU-1"] > table["word"]["BLEU-1"] > 0
    text = format_table(table)
    assert "by character" in text and "jieba" in text and "skipped: METEOR has no Chinese" in text
    assert by_character(["穿", "T恤", "的", "3", "人"]) == ["穿", "T", "恤", "的", "3", "人"]


def test_meteor_is_skipped_with_a_reason_where_there_is_no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "needs Java" in score({"1": ["a"]}, {"1": [["a"]]})["METEOR"]


@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_meteor_is_coco_captions():
    from pycocoevalcap.meteor.meteor import Meteor

    candidates = {"1": "a dog runs on grass".split(), "2": "two men".split()}
    references = {"1": ["a dog is running on the grass".split(), "a dog".split()], "2": ["two men are walking".split()]}
    theirs, _ = Meteor().compute_score({k: [" ".join(r) for r in v] for k, v in references.items()},
                                       {k: [" ".join(v)] for k, v in candidates.items()})  # fmt: skip
    assert score(candidates, references, only=("METEOR",))["METEOR"] == pytest.approx(100 * theirs, abs=1e-6)
