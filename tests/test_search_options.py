"""Every option of beam search against exhaustive search, or its definition written plainly, on a tiny vocabulary."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.errors import UserError
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from preprocess.vocabulary import END, START, UNKNOWN
from tests.test_beam_search import WORDS, Table, grid_of, log_probability, rank, same, seeds


def every_caption(table, photo, max_length, words=range(4, 4 + WORDS)):
    """All captions with their log-probabilities."""
    captions = (list(c) for n in range(max_length + 1) for c in itertools.product(words, repeat=n))
    return [(log_probability(table, photo, caption), caption) for caption in captions]


def found_by(table, photos, **options):
    widest = (WORDS + 2) ** (options["max_length"] + 1)
    return beam_search(table, grid_of(*photos), SearchOptions(**{"beam_size": widest, **options}))


@settings(max_examples=20)
@given(seeds, st.integers(1, 6), st.sampled_from([0.0, 1.0]))
def test_several_captions_are_the_likeliest_of_all_in_order(seed, captions, length_penalty):
    table = Table(seed, end=-1.0)
    options = {"max_length": 2, "num_captions": captions, "length_penalty": length_penalty}
    for photo, found in enumerate(found_by(table, range(2), **options)):
        ranked = sorted(every_caption(table, photo, 2), key=lambda c: -rank(c[0], len(c[1]), length_penalty))
        assert [caption.words for caption in found] == [words for _, words in ranked[:captions]]
        for caption, (score, _) in zip(found, ranked, strict=False):
            assert caption.log_probability == pytest.approx(score, abs=1e-5) and caption.finished


@settings(max_examples=30)
@given(seeds, st.integers(1, 5), st.integers(2, 6))
def test_several_captions_in_a_batch_are_those_of_a_photo_alone(seed, captions, max_length):
    table, search = Table(seed, end=-1.0), SearchOptions(beam_size=5, max_length=max_length, num_captions=captions)
    together = beam_search(table, grid_of(0, 1, 2, 3), search)
    for photo, found in enumerate(together):
        (alone,) = beam_search(table, grid_of(photo), search)
        assert len({tuple(caption.words) for caption in found}) == len(found) == len(alone)
        for one, other in zip(found, alone, strict=True):
            same(one, other)
            assert one.log_probability == pytest.approx(
                log_probability(table, photo, one.words, one.finished), abs=1e-5
            )


def test_where_fewer_end_the_likeliest_unfinished_ones_follow_and_are_marked():
    class EndsOnce(Table):
        def make_row(self, photo, prefix):
            row = torch.tensor([-9.0, -9.0, -9.0, -torch.inf, -0.5, -1.0, -3.0])
            if prefix == [START, 4]:
                row[END] = -0.1
            return row

    (found,) = beam_search(EndsOnce(0), grid_of(0), SearchOptions(beam_size=3, max_length=2, num_captions=2))
    assert [(caption.words, caption.finished) for caption in found] == [([4], True), ([4, 4], False)]
    (all_of_them,) = beam_search(
        Table(0, end=-torch.inf), grid_of(0), SearchOptions(beam_size=3, max_length=2, num_captions=2)
    )
    assert [caption.finished for caption in all_of_them] == [False, False]


@settings(max_examples=20)
@given(seeds, st.integers(0, 3))
def test_no_caption_is_shorter_than_the_least_length(seed, min_length):
    table = Table(seed, end=1.0)
    for photo, (found,) in enumerate(found_by(table, range(2), max_length=3, min_length=min_length)):
        longer = [caption for caption in every_caption(table, photo, 3) if len(caption[1]) >= min_length]
        assert found.words == max(longer)[1]


def repeats(words, size):
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return len(set(runs)) < len(runs)


@settings(max_examples=25)
@given(seeds, st.integers(1, 3))
def test_no_run_of_so_many_words_comes_twice(seed, size):
    table = Table(seed, end=-2.0)
    for photo, (found,) in enumerate(found_by(table, range(2), max_length=4, no_repeat_ngram=size)):
        fresh = [caption for caption in every_caption(table, photo, 4) if not repeats(caption[1], size)]
        assert found.words == max(fresh)[1]


@settings(max_examples=25)
@given(seeds, st.integers(1, 3), st.integers(1, 4))
def test_a_narrow_beam_repeats_nothing_either_also_after_photos_have_left(seed, size, beam_size):
    table = Table(seed, end=-1.5)
    search = SearchOptions(beam_size=beam_size, max_length=8, no_repeat_ngram=size)
    for photo, (found,) in enumerate(beam_search(table, grid_of(*range(5)), search)):
        assert not repeats(found.words, size)
        same(found, beam_search(table, grid_of(photo), search)[0][0])


@settings(max_examples=15)
@given(seeds)
def test_the_unknown_word_is_written_only_where_it_is_allowed(seed):
    table, with_unknown = Table(seed, end=-1.0), (UNKNOWN, *range(4, 4 + WORDS))
    for photo, (found,) in enumerate(found_by(table, range(2), max_length=2, allow_unknown=True)):
        assert found.words == max(every_caption(table, photo, 2, with_unknown))[1]
    assert all(UNKNOWN not in found.words for (found,) in found_by(table, range(2), max_length=2))


def diverse(table, photo, beam_size, groups, diversity, max_length):
    """Vijayakumar et al. 2018, algorithm 1, for one photo, without stopping early -> a group's captions, best first."""
    live, finished = [[(0.0, [])] for _ in range(groups)], [[] for _ in range(groups)]
    for step in range(max_length + 1):
        written = []
        for group in range(groups):
            candidates = [
                (score + float(table.row(photo, [START, *words])[word]), [*words, word])
                for score, words in live[group]
                for word in range(END, table.vocabulary)
            ]
            by_worth = sorted(candidates, key=lambda c: c[0] - diversity * written.count(c[1][-1]), reverse=True)
            kept = [c for c in by_worth[: beam_size // groups] if c[0] > -torch.inf]
            finished[group] += [c for c in kept if c[1][-1] == END]
            written += [c[1][-1] for c in kept]
            live[group] = [c for c in kept if c[1][-1] != END] if step < max_length else []
    return [[words[:-1] for _, words in sorted(group, reverse=True)] for group in finished]


@settings(max_examples=60)
@given(seeds, st.sampled_from([(2, 2), (4, 2), (6, 3), (6, 2)]), st.sampled_from([0.0, 0.7, 5.0]), st.integers(1, 5))
def test_groups_are_the_papers_algorithm(seed, sizes, diversity, max_length):
    beam_size, groups = sizes
    table = Table(seed, end=-0.5)
    search = SearchOptions(beam_size, max_length, num_captions=groups, beam_groups=groups, diversity_penalty=diversity)
    for photo, found in enumerate(beam_search(table, grid_of(*range(4)), search)):
        expected = diverse(table, photo, beam_size, groups, diversity, max_length)
        if all(expected):
            best = dict.fromkeys(tuple(captions[0]) for captions in expected)  # each once
            assert [tuple(caption.words) for caption in found] == list(best)


def test_groups_that_keep_away_from_one_another_say_different_things():
    def first_words(diversity):
        search = SearchOptions(beam_size=3, max_length=4, num_captions=3, beam_groups=3, diversity_penalty=diversity)
        return {caption.words[0] for caption in beam_search(Table(1, end=-4.0), grid_of(0), search)[0]}

    assert len(first_words(0.0)) == 1 and len(first_words(50.0)) == 3


@pytest.mark.parametrize(
    "options, wrong",
    [
        ({"beam_size": 0}, "--beam-size 0: must be 1 or more"),
        ({"min_length": 4, "max_length": 3}, "--min-length 4: must be at most --max-length, now 3"),
        ({"num_captions": 6}, "--num-captions 6: must be at most --beam-size, now 5"),
        ({"beam_groups": 2}, "--beam-groups 2: must divide --beam-size, now 5, and --num-captions, now 1"),
        ({"no_repeat_ngram": -1}, "--no-repeat-ngram -1: must be 0 or more"),
        ({"diversity_penalty": float("nan")}, "--diversity-penalty nan: must be 0 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, wrong):
    with pytest.raises(UserError, match=wrong):
        SearchOptions(**options)
