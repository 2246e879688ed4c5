"""Scores equal those of coco-caption and of their papers' formulas; intervals equal those of a plain bootstrap."""

import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
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
    uninformative,
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
    assert list(found.values()) == pytest.approx([100 * value for value in expected], rel=1e-9, abs=1e-9)


def stats_of_coco_caption(candidates, references):
    """The table of per_image_stats, by pycocoevalcap."""
    texts = reference_texts, candidate_texts = as_text(candidates, references)
    bleu = []
    for photo, (candidate,) in candidate_texts.items():
        (counts,) = BleuScorer(candidate, reference_texts[photo], n=4).ctest
        closest = min((abs(length - counts["testlen"]), length) for length in counts["reflen"])[1]
        bleu.append([*counts["correct"], *counts["guess"], counts["testlen"], closest])
    return np.column_stack([bleu, Rouge().compute_score(*texts)[1], Cider().compute_score(*texts)[1]])


def random_pairs(rng):
    """A set of photos, of captions of few or many words, which may be empty, equal, or much longer than others."""
    vocabulary = [list("ab"), list("abcdef"), ["一只", "狗", "在", "草地", "上", "奔跑"], [*map(str, range(300))]]
    words = vocabulary[rng.integers(len(vocabulary))]
    longest = int(rng.choice([1, 3, 9, 20, 70]))

    def caption(shortest):
        return rng.choice(words, rng.integers(shortest, longest + 1)).tolist()

    def photo():
        references = [caption(int(rng.random() < 0.9)) for _ in range(rng.integers(1, 6))]
        references[0] = references[0] or caption(1)
        if rng.random() < 0.3:
            references.append(references[0])
        candidate = references[0] if rng.random() < 0.1 else caption(0)
        return candidate, references

    return [photo() for _ in range(rng.integers(1, 8))]


def test_every_statistic_of_random_captions_equals_coco_captions(times):
    """One photo or several; empty candidates and references; n-grams that repeat; captions without any of order 4."""
    rng = np.random.default_rng(0)
    for _ in range(times(120, 3000)):
        candidates, references = by_id(random_pairs(rng))
        found, expected = per_image_stats(candidates, references), stats_of_coco_caption(candidates, references)
        np.testing.assert_array_equal(found[:, :10], expected[:, :10])
        np.testing.assert_allclose(found[:, 10:], expected[:, 10:], rtol=1e-9, atol=1e-9)


def test_an_empty_caption_equals_an_empty_reference():
    """As in coco-caption, where splitting an empty text gives one empty word."""
    candidates, references = by_id([([], [["a", "dog"], []]), ([], [["a"]])])
    found = per_image_stats(candidates, references)
    assert found[:, 10].tolist() == [1, 0]
    np.testing.assert_array_equal(found, stats_of_coco_caption(candidates, references))


def test_words_in_every_photo_weigh_exactly_nothing():
    """A rounding error of a logarithm, divided by its norm, would be a score of 10."""
    for num_photos in range(1, 60):
        pairs = [(["a", "a"], [["a"], ["a", "a", "a"]])] * num_photos
        assert not per_image_stats(*by_id(pairs))[:, 11].any()


def test_scoring_takes_memory_in_proportion_to_the_captions_and_less_than_1_gb_for_40_000_photos():
    peaks = []
    for num_photos in (500, 1000):
        candidates, references = random_corpus(num_photos, 3, longest=20, num_references=5)
        tracemalloc.start()
        per_image_stats(candidates, references)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.2 * peaks[0]
    assert 40 * peaks[1] < 1e9


def test_captions_scored_twice_have_the_same_bits():
    corpus = random_corpus(50, 4)
    assert per_image_stats(*corpus).tobytes() == per_image_stats(*corpus).tobytes()


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
    from nltk.translate.bleu_score import corpus_bleu  # takes a second to import

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


@given(corpus)
def test_cider_d_says_nothing_exactly_where_no_caption_can_score_more_than_0(pairs):
    candidates, references = by_id(pairs)
    copies = [{**candidates, photo: words} for photo, captions in references.items() for words in captions]
    always_0 = not any(score(captions, references)["CIDEr-D"] for captions in copies)
    assert ("CIDEr-D" in uninformative(candidates, references)) == always_0


def test_scores_that_say_nothing_are_named_with_their_reason():
    long, short = "a b c d".split(), "a b c".split()
    assert uninformative({"0": long, "1": short}, {"0": [long], "1": [short]}) == {}
    one = uninformative({"0": long}, {"0": [long, short]})
    assert list(one) == ["CIDEr-D"] and one["CIDEr-D"].endswith("there is only one photo")
    alike = uninformative({"0": long, "1": short}, {"0": [long], "1": [long, short]})
    assert list(alike) == ["CIDEr-D"] and alike["CIDEr-D"].endswith("all photos have the same captions")
    brief = uninformative({"0": short, "1": []}, {"0": [long], "1": [short]})
    assert brief == {"BLEU-4": "no caption has four words"}
    brief = uninformative({"0": long, "1": ["a"]}, {"0": [short], "1": [["a"]]})
    assert brief == {"BLEU-4": "no reference has four words"}


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


def random_corpus(num_photos: int, seed: int, longest: int = 8, num_references: int = 3):
    rng = np.random.default_rng(seed)

    def words():
        return rng.choice(list("abcdef"), rng.integers(3, longest + 1)).tolist()

    return by_id([(words(), [words() for _ in range(num_references)]) for _ in range(num_photos)])


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
