"""N-grams as arrays equal those counted one by one."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from captioning.evaluation.ngrams import (
    MAX_ORDER,
    Comparisons,
    count_ngrams,
    document_frequencies,
    inverse_document_frequencies,
    number_ngrams,
)

word_ids = st.sampled_from([0, 1, 2**32 - 1])
captions_of_ids = st.lists(st.lists(word_ids, max_size=7), min_size=1, max_size=6)


def as_arrays(captions):
    """The words of all captions (M,), and how many each has."""
    lengths = np.array([len(words) for words in captions])
    return np.array([word for words in captions for word in words], np.int64), lengths


def words_of(captions, order):
    """All n-grams of each caption, in order."""
    return [[tuple(words[i : i + order]) for i in range(len(words) - order + 1)] for words in captions]


@given(captions_of_ids)
def test_two_ngrams_have_the_same_number_if_and_only_if_they_have_the_same_words(captions):
    orders = list(number_ngrams(*as_arrays(captions)))
    assert len(orders) == MAX_ORDER
    for order, ngrams in enumerate(orders, 1):
        expected = [ngram for caption in words_of(captions, order) for ngram in caption]
        pairs = set(zip(ngrams.number.tolist(), expected, strict=True))
        assert len(pairs) == len(set(expected)) == len(ngrams.codes) == len({number for number, _ in pairs})


@given(captions_of_ids)
def test_counts_and_document_frequencies_equal_those_of_a_counter(captions):
    words, lengths = as_arrays(captions)
    caption_of_word = np.arange(len(captions)).repeat(lengths)
    for order, ngrams in enumerate(number_ngrams(words, lengths), 1):
        name = dict(zip(ngrams.number.tolist(), sum(words_of(captions, order), []), strict=True))
        counts = count_ngrams(caption_of_word[ngrams.start], ngrams)
        found = {(i, name[n]): c for i, n, c in zip(*(column.tolist() for column in counts), strict=True)}
        expected = Counter((i, ngram) for i, caption in enumerate(words_of(captions, order)) for ngram in caption)
        assert found == expected
        photo = caption_of_word // 2  # captions 0 and 1 describe the first photo
        frequencies = document_frequencies(photo[ngrams.start], ngrams)
        expected = Counter(ngram for _, ngram in {(i // 2, ngram) for i, ngram in expected})
        assert {name[number]: count for number, count in enumerate(frequencies.tolist())} == expected


@given(captions_of_ids, captions_of_ids, st.randoms())
def test_matches_are_the_ngrams_that_a_candidate_shares_with_each_reference_of_its_photo(candidates, references, rng):
    """Also with several candidates of one photo, and photos without a candidate."""
    photo_of_reference = sorted(rng.randrange(3) for _ in references)
    photos = sorted(set(photo_of_reference))
    photo_of_candidate = [rng.randrange(len(photos)) for _ in candidates]
    captions = candidates + references
    words, lengths = as_arrays(captions)
    comparisons = Comparisons(
        lengths, np.array(photo_of_candidate), np.array([photo_of_reference.count(photo) for photo in photos])
    )
    pairs = [
        (i, len(candidates) + j)
        for i, photo in enumerate(photo_of_candidate)
        for j, other in enumerate(photo_of_reference)
        if photos[photo] == other
    ]
    assert list(zip(comparisons.candidate.tolist(), comparisons.reference.tolist(), strict=True)) == pairs
    for order, ngrams in enumerate(number_ngrams(words, lengths), 1):
        counts = comparisons.count(ngrams)
        matches = comparisons.match(counts)
        assert (counts.number[matches.candidate] == counts.number[matches.reference]).all()
        found = [pairs[comparison] for comparison in matches.comparison]
        assert found == list(zip(counts.group[matches.candidate], counts.group[matches.reference], strict=True))
        own = [set(caption) for caption in words_of(captions, order)]
        assert Counter(found) == Counter({(i, j): len(own[i] & own[j]) for i, j in pairs if own[i] & own[j]})


def test_an_ngram_in_no_photo_weighs_as_much_as_one_in_one_photo_and_one_in_all_photos_nothing():
    weights = inverse_document_frequencies(np.array([0, 1, 2, 4]), 4)
    np.testing.assert_allclose(weights, [np.log(4), np.log(4), np.log(2), 0], rtol=1e-15)
