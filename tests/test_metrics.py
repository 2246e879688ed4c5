"""Scores equal those of coco-caption and of their papers' formulas; intervals equal those of a plain bootstrap."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from captioning.evaluation.metrics import (
    METRICS,
    NUM_RESAMPLES,
    aggregate,
    bootstrap,
    confidence_interval,
    per_image_stats,
    score,
)

caption = st.lists(st.sampled_from("abcde"), min_size=1, max_size=8)
corpus = st.lists(st.tuples(caption, st.lists(caption, min_size=1, max_size=4)), min_size=1, max_size=6)


def by_id(pairs):
    """(candidate, references) of each photo -> candidates and references by photo id."""
    candidates = {str(i): candidate for i, (candidate, _) in enumerate(pairs)}
    references = {str(i): captions for i, (_, captions) in enumerate(pairs)}
    return candidates, references


def as_text(candidates, references):
    """The same captions as pycocoevalcap expects them: references, candidates."""
    reference_texts = {photo: [" ".join(words) for words in captions] for photo, captions in references.items()}
    return reference_texts, {photo: [" ".join(words)] for photo, words in candidates.items()}


@given(corpus)
def test_scores_equal_those_of_coco_caption(pairs):
    candidates, references = by_id(pairs)
    texts = as_text(candidates, references)
    expected = [
        *Bleu(4).compute_score(*texts, verbose=0)[0],
        Rouge().compute_score(*texts)[0],
        Cider().compute_score(*texts)[0],
    ]
    found = score(candidates, references)
    assert list(found.values()) == pytest.approx([100 * value for value in expected], abs=1e-6)


def ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def plain_cider_d(candidates, references):
    """CIDEr-D, Vedantam et al. 2015, https://arxiv.org/abs/1411.5726: the cosine of clipped tf-idf vectors with a
    Gaussian length penalty, times 10."""
    frequency = Counter(
        g for refs in references.values() for g in {g for r in refs for n in range(1, 5) for g in ngrams(r, n)}
    )
    log_photos = math.log(len(references))

    def vector(words, n):
        return {g: count * (log_photos - math.log(max(1, frequency[g]))) for g, count in ngrams(words, n).items()}

    def similarity(c, r, n):
        a, b = vector(c, n), vector(r, n)
        norm = math.sqrt(sum(v * v for v in a.values())) * math.sqrt(sum(v * v for v in b.values()))
        dot = sum(min(v, b.get(g, 0)) * b.get(g, 0) for g, v in a.items())
        # coco-caption measures the length in bigrams
        gap = max(0, len(c) - 1) - max(0, len(r) - 1)
        return (dot / norm if norm else 0) * math.exp(-(gap**2) / (2 * 6.0**2))

    values = [
        sum(sum(similarity(c, r, n) for n in range(1, 5)) / 4 for r in references[k]) / len(references[k]) * 10
        for k, c in candidates.items()
    ]
    return sum(values) / len(values)


@settings(max_examples=30)
@given(corpus)
def test_cider_d_equals_the_formula_of_its_paper(pairs):
    candidates, references = by_id(pairs)
    found = score(candidates, references)["CIDEr-D"]
    assert found == pytest.approx(100 * plain_cider_d(candidates, references), abs=1e-6)


def plain_bleu(candidates, references, order):
    """Corpus BLEU, Papineni et al. 2002, https://aclanthology.org/P02-1040/.

    The reference closest in length counts, the shorter of two. 1e-15 and 1e-9 are coco-caption's guards against
    division by zero: they matter if no n-gram matches, or a caption has none.
    """
    logs, length, closest = 0.0, 0, 0
    for n in range(1, order + 1):
        matches = total = 0
        for photo, words in candidates.items():
            max_counts = Counter()
            for reference in references[photo]:
                max_counts |= ngrams(reference, n)
            matches += (ngrams(words, n) & max_counts).total()
            total += max(0, len(words) - n + 1)
        logs += math.log((matches + 1e-15) / (total + 1e-9))
    for photo, words in candidates.items():
        length += len(words)
        closest += min((abs(len(r) - len(words)), len(r)) for r in references[photo])[1]
    return math.exp(logs / order + min(0, 1 - closest / length))


def plain_rouge_l(candidates, references):
    """ROUGE-L, Lin 2004, https://aclanthology.org/W04-1013/, with beta 1.2.

    It combines the best precision and the best recall, even of different references.
    """

    def longest_common_subsequence(a, b):
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + longest_common_subsequence(a[1:], b[1:])
        return max(longest_common_subsequence(a[1:], b), longest_common_subsequence(a, b[1:]))

    values = []
    for photo, words in candidates.items():
        precision = max(longest_common_subsequence(words, r) / len(words) for r in references[photo])
        recall = max(longest_common_subsequence(words, r) / len(r) for r in references[photo])
        values.append(2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0)
    return sum(values) / len(values)


@settings(max_examples=30)
@given(corpus)
def test_bleu_equals_the_formula_of_its_paper_also_on_short_captions(pairs):
    candidates, references = by_id(pairs)
    found = score(candidates, references)
    for order in (1, 2, 3, 4):
        assert found[f"BLEU-{order}"] == pytest.approx(100 * plain_bleu(candidates, references, order), abs=1e-5)


@settings(max_examples=30)
@given(corpus)
def test_rouge_l_equals_the_formula_of_its_paper(pairs):
    candidates, references = by_id(pairs)
    found = score(candidates, references)["ROUGE-L"]
    assert found == pytest.approx(100 * plain_rouge_l(candidates, references), abs=1e-6)


long_caption = st.lists(st.sampled_from("ab"), min_size=4, max_size=9)


@settings(max_examples=30)
@given(st.lists(st.tuples(long_caption, st.lists(long_caption, min_size=1, max_size=3)), min_size=3, max_size=6))
def test_bleu_equals_nltks_on_captions_of_four_words_or_more(pairs):
    candidates, references = by_id(pairs)
    found = score(candidates, references)
    for n, weights in ((1, (1,)), (2, (0.5, 0.5))):
        expected = corpus_bleu(list(references.values()), list(candidates.values()), weights)
        assert found[f"BLEU-{n}"] == pytest.approx(100 * expected, abs=1e-4)


def test_a_perfect_caption_scores_a_hundred():
    words = "a dog runs on the grass".split()
    found = score({"1": words, "2": ["a", "cat", "sits", "down"]}, {"1": [words], "2": [["a", "cat", "sits", "down"]]})
    assert [found[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx([100] * 4)
    assert found["ROUGE-L"] == pytest.approx(100)


long_caption = st.lists(st.sampled_from("abcde"), min_size=4, max_size=8)


@given(st.lists(st.lists(long_caption, min_size=1, max_size=3), min_size=1, max_size=5), st.randoms())
@settings(max_examples=30)
def test_a_copy_of_a_reference_has_a_perfect_score_and_no_caption_scores_more(photos, rng):
    references = {str(i): captions for i, captions in enumerate(photos)}
    perfect = score({i: rng.choice(captions) for i, captions in references.items()}, references)
    for name in METRICS[:5]:
        assert perfect[name] == pytest.approx(100, abs=1e-4)
    others = score({i: rng.choices("abcde", k=6) for i in references}, references)
    assert all(others[name] <= 100 + 1e-4 for name in METRICS[:5]) and 0 <= others["CIDEr-D"] <= 1000 + 1e-4


@given(corpus, st.randoms())
@settings(max_examples=15)
def test_the_order_of_references_and_the_names_of_photos_do_not_matter(pairs, rng):
    candidates, references = by_id(pairs)
    shuffled = {f"photo {i}": rng.sample(captions, len(captions)) for i, captions in references.items()}
    renamed = {f"photo {i}": words for i, words in candidates.items()}
    assert score(renamed, shuffled) == pytest.approx(score(candidates, references))


@given(corpus)
@settings(max_examples=10)
def test_the_order_of_photos_does_not_matter(pairs):
    candidates, references = by_id(pairs)
    backwards = dict(reversed(candidates.items()))
    assert score(candidates, references) == pytest.approx(score(backwards, references))


def test_empty_captions_count_as_wrong_and_do_not_fail():
    found = score({"1": [], "2": ["a", "dog"]}, {"1": [["a"]], "2": [["a", "dog"]]})
    assert 0 < found["BLEU-1"] < 100


def test_references_of_other_photos_do_not_count():
    candidates = {"1": ["a", "dog"], "2": ["a", "cat"]}
    references = {"1": [["a", "dog", "runs"]], "2": [["a", "cat"], ["cats"]]}
    more = {**references, "3": [["a", "dog"]]}
    assert score(candidates, more) == score(candidates, references)


def test_captions_that_cannot_be_scored_are_refused():
    with pytest.raises(ValueError, match="no captions"):
        score({}, {})
    with pytest.raises(ValueError, match="photo7"):
        score({"photo7": ["a"]}, {})
    with pytest.raises(ValueError, match="photo8"):
        score({"photo7": ["a"], "photo8": ["a"]}, {"photo7": [["a"]], "photo8": [[]]})
    with pytest.raises(ValueError, match="not one word"):
        score({"1": ["a dog"]}, {"1": [["a"]]})


@settings(max_examples=20)
@given(corpus)
def test_per_caption_scores_equal_those_of_coco_caption(pairs):
    candidates, references = by_id(pairs)
    texts = as_text(candidates, references)
    expected = [
        *Bleu(4).compute_score(*texts, verbose=0)[1],
        Rouge().compute_score(*texts)[1],
        Cider().compute_score(*texts)[1],
    ]
    per_caption = aggregate(per_image_stats(candidates, references)[:, None])
    np.testing.assert_allclose(per_caption.T, 100 * np.array(expected), atol=1e-6)


def random_corpus(num_photos: int, seed: int):
    rng = np.random.default_rng(seed)

    def words():
        return rng.choice(list("abcdef"), rng.integers(3, 9)).tolist()

    return by_id([(words(), [words() for _ in range(3)]) for _ in range(num_photos)])


def test_the_scores_of_a_resample_equal_those_of_the_photos_drawn():
    """BLEU is computed by coco-caption on the photos drawn, with repetitions; the other scores are means."""
    candidates, references = random_corpus(30, 0)
    stats = per_image_stats(candidates, references)
    drawn = [str(i) for i in np.random.default_rng(0).integers(30, size=30)]
    texts = as_text(*by_id([(candidates[photo], references[photo]) for photo in drawn]))
    bleu = Bleu(4).compute_score(*texts, verbose=0)[0]
    means = [100 * np.mean([stats[int(photo), column] for photo in drawn]) for column in (10, 11)]
    np.testing.assert_allclose(bootstrap(stats)[0], [*(100 * value for value in bleu), *means], atol=1e-6)


def test_the_interval_of_a_mean_is_close_to_that_of_the_normal_distribution():
    stats = per_image_stats(*random_corpus(400, 1))
    scores = bootstrap(stats)
    assert scores.shape == (NUM_RESAMPLES, 6)
    for name, column in (("ROUGE-L", 10), ("CIDEr-D", 11)):
        low, high = confidence_interval(scores)[METRICS.index(name)]
        values = 100 * stats[:, column]
        expected = values.mean() + np.array([-1.96, 1.96]) * values.std() / 20
        np.testing.assert_allclose([low, high], expected, atol=0.12 * (expected[1] - expected[0]))


def test_the_interval_excludes_the_lowest_and_highest_fortieth():
    scores = np.random.default_rng(0).permutation(1001)[:, None].repeat(6, 1)
    assert confidence_interval(scores).tolist() == [[25, 975]] * 6


def test_bootstraps_of_the_same_photos_are_equal():
    stats = per_image_stats(*random_corpus(10, 2))
    assert np.array_equal(bootstrap(stats), bootstrap(stats))
