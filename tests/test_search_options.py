"""Every option of beam search equals exhaustive search or its plain definition on a tiny vocabulary."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.errors import UserError
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from preprocess.vocabulary import END, START, UNKNOWN
from tests.test_beam_search import WORDS, TableDecoder, assert_same_caption, log_probability, make_grid, score, seeds


def all_captions(table, photo, max_length, words=range(4, 4 + WORDS)):
    """(log p, words) of every caption."""
    captions = (list(c) for n in range(max_length + 1) for c in itertools.product(words, repeat=n))
    return [(log_probability(table, photo, caption), caption) for caption in captions]


def search_exhaustively(table, photos, **options):
    """Beam search with a beam as wide as the number of captions."""
    widest = (WORDS + 2) ** (options["max_length"] + 1)
    return beam_search(table, make_grid(*photos), SearchOptions(**{"beam_size": widest, **options}))


@settings(max_examples=20)
@given(seeds, st.integers(1, 6), st.sampled_from([0.0, 1.0]))
def test_num_captions_returns_the_captions_of_the_highest_scores_in_order(seed, num_captions, length_penalty):
    table = TableDecoder(seed, end=-1.0)
    options = {"max_length": 2, "num_captions": num_captions, "length_penalty": length_penalty}
    for photo, found in enumerate(search_exhaustively(table, range(2), **options)):
        ranked = sorted(all_captions(table, photo, 2), key=lambda c: -score(c[0], len(c[1]), length_penalty))
        assert [caption.words for caption in found] == [words for _, words in ranked[:num_captions]]
        for caption, (expected, _) in zip(found, ranked, strict=False):
            assert caption.log_probability == pytest.approx(expected, abs=1e-5) and caption.finished


@settings(max_examples=30)
@given(seeds, st.integers(1, 5), st.integers(2, 6))
def test_num_captions_in_a_batch_equals_one_photo_at_a_time(seed, num_captions, max_length):
    table, search = (
        TableDecoder(seed, end=-1.0),
        SearchOptions(beam_size=5, max_length=max_length, num_captions=num_captions),
    )
    together = beam_search(table, make_grid(0, 1, 2, 3), search)
    for photo, found in enumerate(together):
        (alone,) = beam_search(table, make_grid(photo), search)
        assert len({tuple(caption.words) for caption in found}) == len(found) == len(alone)
        for one, other in zip(found, alone, strict=True):
            assert_same_caption(one, other)
            assert one.log_probability == pytest.approx(
                log_probability(table, photo, one.words, one.finished), abs=1e-5
            )


def test_unfinished_captions_follow_where_too_few_finish():
    class EndsOnce(TableDecoder):
        def make_row(self, photo, prefix):
            row = torch.tensor([-9.0, -9.0, -9.0, -torch.inf, -0.5, -1.0, -3.0])
            if prefix == [START, 4]:
                row[END] = -0.1
            return row

    (found,) = beam_search(EndsOnce(0), make_grid(0), SearchOptions(beam_size=3, max_length=2, num_captions=2))
    assert [(caption.words, caption.finished) for caption in found] == [([4], True), ([4, 4], False)]
    (unfinished,) = beam_search(
        TableDecoder(0, end=-torch.inf), make_grid(0), SearchOptions(beam_size=3, max_length=2, num_captions=2)
    )
    assert [caption.finished for caption in unfinished] == [False, False]


@settings(max_examples=20)
@given(seeds, st.integers(0, 3))
def test_no_caption_is_shorter_than_min_length(seed, min_length):
    table = TableDecoder(seed, end=1.0)
    for photo, (found,) in enumerate(search_exhaustively(table, range(2), max_length=3, min_length=min_length)):
        longer = [caption for caption in all_captions(table, photo, 3) if len(caption[1]) >= min_length]
        assert found.words == max(longer)[1]


def repeats_ngram(words, size):
    ngrams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return len(set(ngrams)) < len(ngrams)


@settings(max_examples=25)
@given(seeds, st.integers(1, 3))
def test_no_ngram_occurs_twice(seed, size):
    table = TableDecoder(seed, end=-2.0)
    for photo, (found,) in enumerate(search_exhaustively(table, range(2), max_length=4, no_repeat_ngram=size)):
        allowed = [caption for caption in all_captions(table, photo, 4) if not repeats_ngram(caption[1], size)]
        assert found.words == max(allowed)[1]


@settings(max_examples=25)
@given(seeds, st.integers(1, 3), st.integers(1, 4))
def test_no_ngram_occurs_twice_in_a_narrow_beam_after_photos_have_left_the_batch(seed, size, beam_size):
    table = TableDecoder(seed, end=-1.5)
    search = SearchOptions(beam_size=beam_size, max_length=8, no_repeat_ngram=size)
    for photo, (found,) in enumerate(beam_search(table, make_grid(*range(5)), search)):
        assert not repeats_ngram(found.words, size)
        assert_same_caption(found, beam_search(table, make_grid(photo), search)[0][0])


@settings(max_examples=15)
@given(seeds)
def test_the_unknown_word_appears_only_if_allowed(seed):
    table, with_unknown = TableDecoder(seed, end=-1.0), (UNKNOWN, *range(4, 4 + WORDS))
    for photo, (found,) in enumerate(search_exhaustively(table, range(2), max_length=2, allow_unknown=True)):
        assert found.words == max(all_captions(table, photo, 2, with_unknown))[1]
    assert all(UNKNOWN not in found.words for (found,) in search_exhaustively(table, range(2), max_length=2))


def diverse_beam(table, photo, beam_size, groups, penalty, max_length):
    """Vijayakumar et al. 2018, algorithm 1, for one photo, without stopping early -> captions of each group."""
    live, finished = [[(0.0, [])] for _ in range(groups)], [[] for _ in range(groups)]
    for step in range(max_length + 1):
        chosen = []  # words of the earlier groups at this step
        for group in range(groups):
            candidates = [
                (log_p + float(table.row(photo, [START, *words])[word]), [*words, word])
                for log_p, words in live[group]
                for word in range(END, table.vocab_size)
            ]
            ranked = sorted(candidates, key=lambda c: c[0] - penalty * chosen.count(c[1][-1]), reverse=True)
            beam = [c for c in ranked[: beam_size // groups] if c[0] > -torch.inf]
            finished[group] += [c for c in beam if c[1][-1] == END]
            chosen += [c[1][-1] for c in beam]
            live[group] = [c for c in beam if c[1][-1] != END] if step < max_length else []
    return [[words[:-1] for _, words in sorted(group, reverse=True)] for group in finished]


@given(seeds, st.sampled_from([(2, 2), (4, 2), (6, 3), (6, 2)]), st.sampled_from([0.0, 0.7, 5.0]), st.integers(1, 5))
def test_beam_groups_equal_algorithm_1_of_the_paper(seed, sizes, penalty, max_length):
    beam_size, groups = sizes
    table = TableDecoder(seed, end=-0.5)
    search = SearchOptions(beam_size, max_length, num_captions=groups, beam_groups=groups, diversity_penalty=penalty)
    for photo, found in enumerate(beam_search(table, make_grid(*range(4)), search)):
        expected = diverse_beam(table, photo, beam_size, groups, penalty, max_length)
        if all(expected):
            best = dict.fromkeys(tuple(captions[0]) for captions in expected)  # each once
            assert [tuple(caption.words) for caption in found] == list(best)


def test_a_high_diversity_penalty_makes_the_groups_differ():
    def first_words(penalty):
        search = SearchOptions(beam_size=3, max_length=4, num_captions=3, beam_groups=3, diversity_penalty=penalty)
        return {caption.words[0] for caption in beam_search(TableDecoder(1, end=-4.0), make_grid(0), search)[0]}

    assert len(first_words(0.0)) == 1 and len(first_words(50.0)) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beam_size": 0}, "--beam-size 0: must be 1 or more"),
        ({"min_length": 4, "max_length": 3}, "--min-length 4: must be at most --max-length, now 3"),
        ({"num_captions": 6}, "--num-captions 6: must be at most --beam-size, now 5"),
        ({"beam_groups": 2}, "--beam-groups 2: must divide --beam-size, now 5, and --num-captions, now 1"),
        ({"no_repeat_ngram": -1}, "--no-repeat-ngram -1: must be 0 or more"),
        ({"diversity_penalty": float("nan")}, "--diversity-penalty nan: must be 0 or more"),
        ({"top_p": 0.5}, "--top-p: applies to sampling only; give --temperature too"),
        ({"temperature": 1.0, "min_length": 2}, "--min-length: applies to beam search only"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SearchOptions(**options)
