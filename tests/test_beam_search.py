"""Beam search against exhaustive search and a plain greedy loop, with fake decoders: no training."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning.decoders import DECODERS
from captioning.decoders.factory import build_decoder
from captioning.decoders.protocol import State, Step
from captioning.encoders.grid import Grid, grid_pooling
from captioning.errors import UserError
from captioning.search import beam_search as module
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from preprocess.vocabulary import END, PAD, START, UNKNOWN

WORDS = 3  # beside the four special ones
seeds = st.integers(0, 10_000)


def digits(words):
    return int("".join(map(str, words)))


class Table:
    """log p(next | photo, the whole prefix) from random tables, made when asked for. Cells hold the photo's number.

    Attention tells what is continued: the photo, and the digits of the whole prefix.
    """

    uses_attention = True

    def __init__(self, seed, vocabulary=4 + WORDS, end=0.0, impossible=0.0, levels=None):
        self.seed, self.vocabulary, self.end, self.impossible, self.levels = seed, vocabulary, end, impossible, levels
        self.rows, self.seen = {}, []

    def make_row(self, photo, prefix):
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + digits([photo + 1, *prefix])) % 2**62)
        scores = torch.randn(self.vocabulary, generator=generator)
        if self.levels:
            scores = (scores * self.levels).round() / self.levels
        scores[END] += self.end
        scores[torch.rand(self.vocabulary, generator=generator) < self.impossible] = -torch.inf
        scores[UNKNOWN] = 1.0  # always likely, never to be written
        return scores.log_softmax(0)

    def row(self, photo, prefix):
        key = (photo, *prefix)
        if key not in self.rows:
            self.rows[key] = self.make_row(photo, prefix)
        return self.rows[key]

    def init_state(self, grid):
        photos = grid.cells[:, 0, 0].long()
        return State((photos,), (torch.zeros(len(photos), 0, dtype=torch.long),))

    def step(self, words, state):
        prefixes = torch.cat([state.per_caption[0], words[:, None]], 1)
        photos = state.per_photo[0].repeat_interleave(len(prefixes) // len(state.per_photo[0])).tolist()
        self.seen.append([(photo, *prefix) for photo, prefix in zip(photos, prefixes.tolist(), strict=True)])
        scores = torch.stack([self.row(photo, prefix) for photo, *prefix in self.seen[-1]])
        attention = torch.tensor([[float(photo), digits(prefix)] for photo, *prefix in self.seen[-1]])
        return Step(scores, attention, State(state.per_photo, (prefixes,)))


def grid_of(*photos):
    return Grid(torch.tensor(photos).float().view(-1, 1, 1), torch.ones(196, 1))


def best(decoder, grid, beam_size, max_length, length_penalty=0.0):
    """The best caption of each photo."""
    search = SearchOptions(beam_size, max_length, length_penalty=length_penalty)
    return [first for (first,) in beam_search(decoder, grid, search)]


def log_probability(table, photo, words, finished=True):
    words = [*words, END] if finished else words
    prefixes = ([START, *words[:i]] for i in range(len(words)))
    return sum(float(table.row(photo, prefix)[word]) for prefix, word in zip(prefixes, words, strict=True))


def rank(log_probability, words, length_penalty):
    return log_probability / (words + 1) ** length_penalty  # <end> is a word too


def exhaustive(table, photo, max_length, length_penalty):
    allowed = range(4, table.vocabulary)
    captions = (c for n in range(max_length + 1) for c in itertools.product(allowed, repeat=n))
    scored = ((log_probability(table, photo, caption), list(caption)) for caption in captions)
    return max(scored, key=lambda found: rank(found[0], len(found[1]), length_penalty))


def greedy(table, photo, max_length):
    prefix = [START]
    while True:
        row = table.row(photo, prefix).clone()
        row[[PAD, UNKNOWN, START]] = -torch.inf
        word = int(row.argmax())
        if word == END or len(prefix) > max_length:
            return prefix[1:], word == END
        prefix.append(word)


def plain_beam(table, photo, beam_size, max_length, length_penalty):
    """The definition, without a batch and without stopping early."""
    live, finished, longest = [(0.0, [])], [], [(0.0, [])]
    for step in range(max_length + 1):
        candidates = [
            (score + float(table.row(photo, [START, *words])[word]), [*words, word])
            for score, words in live
            for word in range(END, table.vocabulary)
        ]
        kept = sorted((c for c in candidates if c[0] > -torch.inf), reverse=True)[:beam_size]
        finished += [c for c in kept if c[1][-1] == END]
        live = [c for c in kept if c[1][-1] != END]
        longest = live if live and step < max_length else longest
    finished = [(rank(score, len(words) - 1, length_penalty), words) for score, words in finished]
    return (max(finished)[1][:-1], True) if finished else (max(longest)[1], False)


def same(found, expected):
    assert (found.words, found.finished) == (expected.words, expected.finished)
    assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-5)
    torch.testing.assert_close(found.attention, expected.attention)


@settings(max_examples=12)
@given(seeds, st.integers(1, 3), st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.7, 1.0, 2.0]))
def test_a_wide_beam_finds_what_exhaustive_search_finds_on_a_tiny_vocabulary(
    seed, max_length, impossible, length_penalty
):
    table, widest = Table(seed, end=-1.0, impossible=impossible), (WORDS + 1) ** (max_length + 1)
    for photo, found in enumerate(best(table, grid_of(0, 1, 2), widest, max_length, length_penalty)):
        highest, words = exhaustive(table, photo, max_length, length_penalty)
        if highest > -torch.inf:
            assert found.words == words and found.finished
            assert found.log_probability == pytest.approx(highest, abs=1e-5)
        else:
            assert not found.finished


@settings(max_examples=25)
@given(seeds, st.integers(1, 8))
def test_a_beam_of_one_equals_greedy(seed, max_length):
    table = Table(seed, end=-0.5)
    for photo, found in enumerate(best(table, grid_of(0, 1, 2), 1, max_length)):
        assert (found.words, found.finished) == greedy(table, photo, max_length)


@settings(max_examples=60)
@given(seeds, st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.7, 1.5]))
def test_a_beam_of_any_width_equals_the_definition_written_plainly(
    seed, beam_size, max_length, impossible, length_penalty
):
    table = Table(seed, end=-0.5, impossible=impossible)
    for photo, found in enumerate(best(table, grid_of(0, 1, 2, 3), beam_size, max_length, length_penalty)):
        assert (found.words, found.finished) == plain_beam(table, photo, beam_size, max_length, length_penalty)


@settings(max_examples=12)
@given(seeds, st.integers(1, 4), st.sampled_from([None, 1]), st.sampled_from([0.0, 0.4]), st.sampled_from([1, 3, 4]))
def test_a_batch_equals_one_photo_at_a_time(seed, beam_size, levels, impossible, look_every):
    """Also with many equal scores, with impossible words, and where the looks are as rare as on a GPU."""
    table = Table(seed, end=-0.5, levels=levels, impossible=impossible)
    alone = [best(table, grid_of(photo), beam_size, 5)[0] for photo in range(5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sync_interval", lambda device: look_every)
        together = best(table, grid_of(*range(5)), beam_size, 5)
    for found, expected in zip(together, alone, strict=True):
        same(found, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_a_batch_equals_one_photo_at_a_time_with_a_real_decoder(name):
    torch.manual_seed(0)
    sizes = dict(vocabulary_size=12, channels=6, embedding_size=5, attention_size=4, hidden_size=7, dropout=0.5)
    decoder = build_decoder(name, sizes).eval()
    with torch.no_grad():  # sharper than at the start, so that photos differ and end at different steps
        for weights in decoder.parameters():
            weights.normal_(0, 0.5) if name == "adaptive" else weights.mul_(4)
        decoder.output_layer.bias[END] = -2
    grid = Grid(3 * torch.randn(6, 64, 6), grid_pooling(8, 8))
    together = best(decoder, grid, 3, 9)
    assert len({tuple(caption.words) for caption in together}) > 1
    for photo, found in enumerate(together):
        same(found, best(decoder, grid.select(torch.tensor([photo])), 3, 9)[0])


@settings(max_examples=25)
@given(seeds, st.integers(1, 6), st.sampled_from([-torch.inf, -2.0, 0.0]), st.integers(1, 5))
def test_the_score_is_that_of_the_words_and_forbidden_words_never_appear(seed, beam_size, end, max_length):
    table = Table(seed, end=end)
    for photo, found in enumerate(best(table, grid_of(0, 1), beam_size, max_length)):
        expected = log_probability(table, photo, found.words, found.finished)
        assert found.log_probability == pytest.approx(expected, abs=1e-5)
        assert all(word > END for word in found.words) and len(found.words) <= max_length


def test_what_never_ends_is_returned_and_marked_unfinished():
    for caption in best(Table(1, end=-torch.inf), grid_of(0, 1, 2), 4, 5):
        assert not caption.finished and len(caption.words) == len(caption.attention) == 5


def test_a_caption_that_would_go_on_is_not_made_to_end():
    """Any real decoder gives <end> some probability everywhere."""
    for caption in best(Table(1, end=-20.0), grid_of(0, 1, 2), WORDS, 5):
        assert not caption.finished and len(caption.words) == 5


@settings(max_examples=10)
@given(seeds)
def test_the_likeliest_unfinished_hypothesis_stands_in(seed):
    table = Table(seed, end=-torch.inf)
    found = best(table, grid_of(0), WORDS**3, 3)[0]
    highest = max(log_probability(table, 0, words, False) for words in itertools.product(range(4, 4 + WORDS), repeat=3))
    assert found.log_probability == pytest.approx(highest, abs=1e-5)


@settings(max_examples=40)
@given(seeds, st.integers(1, 4))
def test_attention_rows_belong_to_their_words(seed, beam_size):
    for photo, found in enumerate(best(Table(seed, end=-1.0), grid_of(0, 1, 2, 3), beam_size, 6)):
        before = [[photo, digits([START, *found.words[:i]])] for i in range(len(found.words))]
        assert found.attention.dtype == torch.float32
        assert found.attention.tolist() == before


def test_a_decoder_without_attention_gives_none():
    class Blind(Table):
        def step(self, words, state):
            return super().step(words, state)._replace(attention=None)

    assert [caption.attention for caption in best(Blind(0), grid_of(0, 1), 2, 4)] == [None, None]


@settings(max_examples=15)
@given(seeds, st.integers(2, 12))
def test_no_two_hypotheses_of_a_beam_are_equal(seed, beam_size):
    table = Table(seed, end=-1.0)
    best(table, grid_of(0, 1), beam_size, 5)
    for hypotheses in table.seen:
        assert len(set(hypotheses)) == len(hypotheses)


@pytest.mark.parametrize("vocabulary", [4, 5, 7])
def test_a_beam_wider_than_the_vocabulary_and_captions_of_one_word_work(vocabulary):
    table = Table(2, vocabulary=vocabulary)
    for photo, found in enumerate(best(table, grid_of(0, 1, 2), 50, 1)):
        assert found.words == exhaustive(table, photo, 1, 0.0)[1]


class Impossible(Table):
    """Photo 0: nothing at all can be written; photo 1: nothing after the first word; photo 2: only <end>."""

    def make_row(self, photo, prefix):
        row = torch.full((self.vocabulary,), -torch.inf)
        if photo == 1 and len(prefix) == 1:
            row[5] = -1.0
        if photo == 2:
            row[END] = 0.0
        return row


@pytest.mark.parametrize("beam_size", [1, 3, 50])
def test_a_dead_end_gives_what_was_written_before_it_and_no_nan(beam_size):
    nothing, one_word, ended = best(Impossible(0), grid_of(0, 1, 2), beam_size, 4)
    assert (nothing.words, nothing.log_probability, nothing.finished) == ([], 0.0, False)
    assert (one_word.words, one_word.log_probability, one_word.finished) == ([5], -1.0, False)
    assert (ended.words, ended.log_probability, ended.finished) == ([], 0.0, True)


class Planned(Table):
    """Photo n surely ends after n words."""

    def make_row(self, photo, prefix):
        row = torch.full((self.vocabulary,), -10.0)
        row[END if len(prefix) > photo else 4] = -0.01
        return row


def test_photos_that_are_done_leave_the_batch_and_the_search_ends_with_the_last():
    table = Planned(0)
    captions = best(table, grid_of(5, 0, 1, 3, 0, 2), 2, 20)
    assert [len(caption.words) for caption in captions] == [5, 0, 1, 3, 0, 2]
    assert [len(hypotheses) for hypotheses in table.seen] == [6, 12, 6, 6, 2, 2]  # rows: photos, then photos x 2
    assert all(set(caption.attention[:, 0].tolist()) <= {len(caption.words)} for caption in captions)


def test_a_finished_hypothesis_does_not_hide_a_better_one_that_ends_later():
    class Late(Table):
        def make_row(self, photo, prefix):
            row = torch.full((self.vocabulary,), -9.0)
            row[[END, 4]] = torch.tensor([-0.7, -0.5]) if len(prefix) == 1 else torch.tensor([-0.1, -5.0])
            return row

    found = best(Late(0), grid_of(0), 2, 5)[0]
    assert found.words == [4] and found.log_probability == pytest.approx(-0.6)


def test_the_decoders_own_scores_are_left_alone():
    table = Table(3)
    best(table, grid_of(0, 1), 3, 4)
    assert all(row.equal(table.make_row(photo, list(prefix))) for (photo, *prefix), row in table.rows.items())

    class LossModule(Planned):
        scores = torch.full((1, 7), -1.0)

        def step(self, words, state):
            return super().step(words, state)._replace(log_probabilities=self.scores.expand(len(words), -1))

    best(LossModule(0), grid_of(0, 1), 3, 4)
    assert LossModule.scores.tolist() == [[-1.0] * 7]


@pytest.mark.parametrize("beam_size, max_length", [(0, 5), (3, 0), (-1, 5)])
def test_a_beam_or_a_length_below_one_is_refused(beam_size, max_length):
    with pytest.raises(UserError, match="must be 1 or more"):
        best(Table(0), grid_of(0), beam_size, max_length)


@pytest.mark.parametrize("length_penalty", [-0.1, float("nan")])
def test_a_length_penalty_below_zero_is_refused(length_penalty):
    with pytest.raises(UserError, match="must be 0 or more"):
        best(Table(0), grid_of(0), 3, 5, length_penalty)
