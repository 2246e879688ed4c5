"""Beam search against exhaustive search and a plain greedy loop, with fake decoders: no training."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.beam_search import beam_search
from captioning.decoders.protocol import State, Step
from captioning.grid import Grid
from preprocess.vocabulary import END, START

WORDS = 3  # beside the four special ones


class Table:
    """log p(next | photo, the whole prefix), from a random table. Cells carry the photo's number."""

    sees_cells = True

    def __init__(self, seed, vocabulary=4 + WORDS, never_ends=False):
        self.seed, self.vocabulary, self.never_ends = seed, vocabulary, never_ends

    def row(self, photo, prefix):
        digits = int("".join(map(str, [photo + 1, *prefix])))
        scores = torch.randn(self.vocabulary, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + digits))
        if self.never_ends:
            scores[END] = -torch.inf
        return scores.log_softmax(0)

    def begin(self, grid):
        photos = grid.cells[:, 0, 0].long()
        return State((photos,), (torch.zeros(len(photos), 0, dtype=torch.long),))

    def step(self, words, state):
        prefix = torch.cat([state.rows[0], words[:, None]], 1)
        beams = len(prefix) // len(state.photos[0])
        photos = state.photos[0].repeat_interleave(beams)
        scores = torch.stack([self.row(int(p), row.tolist()) for p, row in zip(photos, prefix, strict=True)])
        # attention says after which prefix the word is written: its length, its last word
        attention = torch.stack(
            [torch.tensor([float(len(row)), float(row[-1]), float(p)]) for p, row in zip(photos, prefix, strict=True)]
        )
        return Step(scores, attention, State(state.photos, (prefix,)))


def photos(count):
    return Grid(torch.arange(count).float().view(-1, 1, 1), torch.ones(196, 1))


def log_probability(table, photo, words, finished=True):
    prefix, total = [START], 0.0
    for word in [*words, END] if finished else words:
        total += float(table.row(photo, prefix)[word])
        prefix.append(word)
    return total


def exhaustive(table, photo, max_length):
    allowed = range(4, table.vocabulary)
    captions = (c for n in range(max_length + 1) for c in itertools.product(allowed, repeat=n))
    return max((log_probability(table, photo, c), list(c)) for c in captions)


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_beam_finds_what_exhaustive_search_finds_on_a_tiny_vocabulary(seed, max_length):
    table = Table(seed)
    for photo, found in enumerate(beam_search(table, photos(3), (WORDS + 1) ** max_length, max_length)):
        best, words = exhaustive(table, photo, max_length)
        assert found.words == words and found.finished
        assert found.log_probability == pytest.approx(best, abs=1e-5)


@settings(max_examples=15)
@given(st.integers(0, 10_000))
def test_beam_of_one_equals_greedy(seed):
    table = Table(seed)
    for photo, found in enumerate(beam_search(table, photos(3), 1, 6)):
        prefix = [START]
        while len(prefix) <= 6 and (len(prefix) == 1 or prefix[-1] != END):
            row = table.row(photo, prefix)
            row[[0, 1, 2]] = -torch.inf
            prefix.append(int(row.argmax()))
        words = prefix[1:]
        assert found.words == [w for w in words if w != END]


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_a_batch_equals_one_photo_at_a_time(seed, beam_size):
    table = Table(seed)
    together = beam_search(table, photos(5), beam_size, 7)
    for photo, found in enumerate(together):
        alone = beam_search(table, photos(5).select(torch.tensor([photo])), beam_size, 7)[0]
        assert (found.words, found.finished) == (alone.words, alone.finished)
        assert found.log_probability == pytest.approx(alone.log_probability, abs=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
def test_the_score_is_that_of_the_words_and_forbidden_words_never_appear(seed, beam_size, never_ends):
    table = Table(seed, never_ends=never_ends)
    for photo, found in enumerate(beam_search(table, photos(2), beam_size, 5)):
        assert found.log_probability == pytest.approx(
            log_probability(table, photo, found.words, found.finished), abs=1e-5
        )
        assert all(word >= 4 for word in found.words) and len(found.words) <= 5


def test_what_never_ends_is_marked_unfinished_and_no_exception():
    for caption in beam_search(Table(1, never_ends=True), photos(3), 4, 5):
        assert not caption.finished and len(caption.words) == 5


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_attention_rows_belong_to_their_words(seed, beam_size):
    for photo, found in enumerate(beam_search(Table(seed), photos(4), beam_size, 6)):
        before = [START, *found.words][: len(found.words)]
        expected = [[float(n), float(word), float(photo)] for n, word in enumerate(before, 1)]
        assert found.attention.tolist() == expected


def test_a_beam_wider_than_the_vocabulary_and_a_caption_of_one_word_work():
    found = beam_search(Table(2, vocabulary=5), photos(2), 50, 1)
    assert [caption.words for caption in found] == [exhaustive(Table(2, vocabulary=5), photo, 1)[1] for photo in (0, 1)]


def test_impossible_words_give_no_nan():
    class OnlyEnds(Table):
        def row(self, photo, prefix):
            row = torch.full((self.vocabulary,), -torch.inf)
            row[END] = 0.0
            return row

    caption = beam_search(OnlyEnds(0), photos(1), 3, 4)[0]
    assert caption.words == [] and caption.log_probability == 0.0 and caption.finished
