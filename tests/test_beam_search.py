"""Beam search equals exhaustive search, greedy decoding and its plain definition, on fake decoders."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from captioning.decoders import DECODERS
from captioning.decoders.factory import build_decoder
from captioning.decoders.protocol import State, Step
from captioning.encoders.grid import Grid, grid_pooling
from captioning.errors import UserError
from captioning.search import beam_search as module
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from preprocess.vocabulary import END, PAD, START, UNKNOWN
from tests.test_decoders import OWN_SIZES

WORDS = 3  # in the vocabulary, besides the four special ones
seeds = st.integers(0, 10_000)


def digits(words):
    """A prefix as a number: [1, 2, 3] -> 123."""
    return int("".join(map(str, words)))


class TableDecoder:
    """A decoder with random log p(next word | photo, prefix), generated on demand. Grid cells hold the photo's number.

    Its attention identifies what it continues: the photo, and the digits of the prefix.
    """

    uses_attention = True

    def __init__(self, seed, vocab_size=4 + WORDS, end=0.0, impossible=0.0, levels=None):
        """end: added to the logit of <end>; impossible: fraction of words with probability 0.

        levels: round logits to 1 / levels, so that many are equal; None does not round.
        """
        self.seed = seed
        self.vocab_size = vocab_size
        self.end = end
        self.impossible = impossible
        self.levels = levels
        self.rows = {}  # (photo, *prefix) -> log-probabilities
        self.steps = []  # (photo, *prefix) of every hypothesis of each step

    def make_row(self, photo, prefix):
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + digits([photo + 1, *prefix])) % 2**62)
        logits = torch.randn(self.vocab_size, generator=generator)
        if self.levels:
            logits = (logits * self.levels).round() / self.levels
        logits[END] += self.end
        logits[torch.rand(self.vocab_size, generator=generator) < self.impossible] = -torch.inf
        logits[UNKNOWN] = 1.0  # always likely, and banned
        return logits.log_softmax(0)

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
        hypotheses = [(photo, *prefix) for photo, prefix in zip(photos, prefixes.tolist(), strict=True)]
        self.steps.append(hypotheses)
        log_probabilities = torch.stack([self.row(photo, prefix) for photo, *prefix in hypotheses])
        attention = torch.tensor([[float(photo), digits(prefix)] for photo, *prefix in hypotheses])
        return Step(log_probabilities, attention, State(state.per_photo, (prefixes,)))


def make_grid(*photos):
    return Grid(torch.tensor(photos).float().view(-1, 1, 1), torch.ones(196, 1))


def best_captions(decoder, grid, beam_size, max_length, length_penalty=0.0):
    """The best caption of each photo."""
    search = SearchOptions(beam_size, max_length, length_penalty=length_penalty)
    return [best for (best,) in beam_search(decoder, grid, search)]


def log_probability(table, photo, words, finished=True):
    """log p of a caption, including <end> if finished."""
    words = [*words, END] if finished else words
    prefixes = ([START, *words[:i]] for i in range(len(words)))
    return sum(float(table.row(photo, prefix)[word]) for prefix, word in zip(prefixes, words, strict=True))


def score(log_probability, num_words, length_penalty):
    """The score of a finished caption, whose length includes <end>."""
    return log_probability / (num_words + 1) ** length_penalty


def exhaustive(table, photo, max_length, length_penalty):
    """log p and words of the best of all captions."""
    vocabulary = range(4, table.vocab_size)
    captions = (c for n in range(max_length + 1) for c in itertools.product(vocabulary, repeat=n))
    scored = ((log_probability(table, photo, caption), list(caption)) for caption in captions)
    return max(scored, key=lambda found: score(found[0], len(found[1]), length_penalty))


def greedy(table, photo, max_length):
    """Words of the greedy caption, and whether it ends."""
    prefix = [START]
    while True:
        row = table.row(photo, prefix).clone()
        row[[PAD, UNKNOWN, START]] = -torch.inf
        word = int(row.argmax())
        if word == END or len(prefix) > max_length:
            return prefix[1:], word == END
        prefix.append(word)


def plain_beam(table, photo, beam_size, max_length, length_penalty):
    """The definition of beam search for one photo, without stopping early -> words, and whether they end."""
    live, finished, longest = [(0.0, [])], [], [(0.0, [])]
    for step in range(max_length + 1):
        candidates = [
            (log_p + float(table.row(photo, [START, *words])[word]), [*words, word])
            for log_p, words in live
            for word in range(END, table.vocab_size)
        ]
        beam = sorted((c for c in candidates if c[0] > -torch.inf), reverse=True)[:beam_size]
        finished += [c for c in beam if c[1][-1] == END]
        live = [c for c in beam if c[1][-1] != END]
        longest = live if live and step < max_length else longest
    finished = [(score(log_p, len(words) - 1, length_penalty), words) for log_p, words in finished]
    return (max(finished)[1][:-1], True) if finished else (max(longest)[1], False)


def assert_same_caption(found, expected):
    assert (found.words, found.finished) == (expected.words, expected.finished)
    assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-5)
    torch.testing.assert_close(found.attention, expected.attention)


@settings(max_examples=12)
@given(seeds, st.integers(1, 3), st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.7, 1.0, 2.0]))
def test_a_wide_beam_finds_what_exhaustive_search_finds_on_a_tiny_vocabulary(
    seed, max_length, impossible, length_penalty
):
    table, widest = TableDecoder(seed, end=-1.0, impossible=impossible), (WORDS + 1) ** (max_length + 1)
    for photo, found in enumerate(best_captions(table, make_grid(0, 1, 2), widest, max_length, length_penalty)):
        highest, words = exhaustive(table, photo, max_length, length_penalty)
        if highest > -torch.inf:
            assert found.words == words and found.finished
            assert found.log_probability == pytest.approx(highest, abs=1e-5)
        else:
            assert not found.finished


@settings(max_examples=25)
@given(seeds, st.integers(1, 8))
def test_a_beam_of_one_equals_greedy(seed, max_length):
    table = TableDecoder(seed, end=-0.5)
    for photo, found in enumerate(best_captions(table, make_grid(0, 1, 2), 1, max_length)):
        assert (found.words, found.finished) == greedy(table, photo, max_length)


@given(seeds, st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.7, 1.5]))
def test_a_beam_of_any_width_equals_the_definition_written_plainly(
    seed, beam_size, max_length, impossible, length_penalty
):
    table = TableDecoder(seed, end=-0.5, impossible=impossible)
    for photo, found in enumerate(best_captions(table, make_grid(0, 1, 2, 3), beam_size, max_length, length_penalty)):
        assert (found.words, found.finished) == plain_beam(table, photo, beam_size, max_length, length_penalty)


@settings(max_examples=12)
@given(
    seeds,
    st.integers(1, 4),
    st.sampled_from([None, 1]),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 1]),
)
def test_a_batch_equals_one_photo_at_a_time(seed, beam_size, levels, impossible, interval, delay):
    """Also with many equal scores, impossible words and a GPU's checks: every few steps, each read at the next."""
    table = TableDecoder(seed, end=-0.5, levels=levels, impossible=impossible)
    alone = [best_captions(table, make_grid(photo), beam_size, 5)[0] for photo in range(5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sync_interval", lambda device: interval)
        patch.setattr("captioning.search.end_check.check_delay", lambda device: delay)
        together = best_captions(table, make_grid(*range(5)), beam_size, 5)
    for found, expected in zip(together, alone, strict=True):
        assert_same_caption(found, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_a_batch_equals_one_photo_at_a_time_with_a_real_decoder(name):
    torch.manual_seed(0)
    sizes = dict(vocabulary_size=12, channels=6, embedding_size=5, attention_size=4, hidden_size=7, dropout=0.5)
    decoder = build_decoder(name, {**sizes, **OWN_SIZES.get(name, {})}).eval()
    with torch.no_grad():  # sharpen the distributions, so that captions differ and end at different steps
        for weights in decoder.parameters():
            weights.normal_(0, 0.5) if name == "adaptive" else weights.mul_(2 if name in ("xlan", "aoa") else 4)
        decoder.output_layer.bias[END] = -2
    grid = Grid(3 * torch.randn(6, 64, 6), grid_pooling(8, 8))
    together = best_captions(decoder, grid, 3, 9)
    assert len({tuple(caption.words) for caption in together}) > 1
    for photo, found in enumerate(together):
        assert_same_caption(found, best_captions(decoder, grid.select(torch.tensor([photo])), 3, 9)[0])


@settings(max_examples=25)
@given(seeds, st.integers(1, 6), st.sampled_from([-torch.inf, -2.0, 0.0]), st.integers(1, 5))
def test_log_probability_is_that_of_the_words_and_banned_words_never_appear(seed, beam_size, end, max_length):
    table = TableDecoder(seed, end=end)
    for photo, found in enumerate(best_captions(table, make_grid(0, 1), beam_size, max_length)):
        expected = log_probability(table, photo, found.words, found.finished)
        assert found.log_probability == pytest.approx(expected, abs=1e-5)
        assert all(word > END for word in found.words) and len(found.words) <= max_length


def test_a_caption_that_never_ends_is_returned_as_unfinished():
    for caption in best_captions(TableDecoder(1, end=-torch.inf), make_grid(0, 1, 2), 4, 5):
        assert not caption.finished and len(caption.words) == len(caption.attention) == 5


def test_an_unlikely_end_is_not_forced_at_the_last_step():
    """Real decoders give <end> a positive probability at every step."""
    for caption in best_captions(TableDecoder(1, end=-20.0), make_grid(0, 1, 2), WORDS, 5):
        assert not caption.finished and len(caption.words) == 5


@settings(max_examples=10)
@given(seeds)
def test_the_most_probable_unfinished_hypothesis_is_returned_where_none_finishes(seed):
    table = TableDecoder(seed, end=-torch.inf)
    found = best_captions(table, make_grid(0), WORDS**3, 3)[0]
    highest = max(log_probability(table, 0, words, False) for words in itertools.product(range(4, 4 + WORDS), repeat=3))
    assert found.log_probability == pytest.approx(highest, abs=1e-5)


@given(seeds, st.integers(1, 4))
def test_each_attention_row_belongs_to_its_word(seed, beam_size):
    for photo, found in enumerate(best_captions(TableDecoder(seed, end=-1.0), make_grid(0, 1, 2, 3), beam_size, 6)):
        expected = [[photo, digits([START, *found.words[:i]])] for i in range(len(found.words))]
        assert found.attention.dtype == torch.float32
        assert found.attention.tolist() == expected


def test_a_decoder_without_attention_gives_none():
    class WithoutAttention(TableDecoder):
        def step(self, words, state):
            return super().step(words, state)._replace(attention=None)

    assert [caption.attention for caption in best_captions(WithoutAttention(0), make_grid(0, 1), 2, 4)] == [None, None]


@settings(max_examples=15)
@given(seeds, st.integers(2, 12))
def test_no_two_hypotheses_of_a_beam_are_equal(seed, beam_size):
    table = TableDecoder(seed, end=-1.0)
    best_captions(table, make_grid(0, 1), beam_size, 5)
    for hypotheses in table.steps:
        assert len(set(hypotheses)) == len(hypotheses)


@pytest.mark.parametrize("vocab_size", [4, 5, 7])
def test_a_beam_wider_than_the_vocabulary_and_captions_of_one_word_work(vocab_size):
    table = TableDecoder(2, vocab_size=vocab_size)
    for photo, found in enumerate(best_captions(table, make_grid(0, 1, 2), 50, 1)):
        assert found.words == exhaustive(table, photo, 1, 0.0)[1]


class DeadEnds(TableDecoder):
    """Photo 0: no word is possible; photo 1: none after the first word; photo 2: only <end>."""

    def make_row(self, photo, prefix):
        row = torch.full((self.vocab_size,), -torch.inf)
        if photo == 1 and len(prefix) == 1:
            row[5] = -1.0
        if photo == 2:
            row[END] = 0.0
        return row


@pytest.mark.parametrize("beam_size", [1, 3, 50])
def test_a_dead_end_returns_the_words_before_it_without_nan(beam_size):
    nothing, one_word, ended = best_captions(DeadEnds(0), make_grid(0, 1, 2), beam_size, 4)
    assert (nothing.words, nothing.log_probability, nothing.finished) == ([], 0.0, False)
    assert (one_word.words, one_word.log_probability, one_word.finished) == ([5], -1.0, False)
    assert (ended.words, ended.log_probability, ended.finished) == ([], 0.0, True)


class EndsAfter(TableDecoder):
    """Photo n ends after n words, almost certainly."""

    def make_row(self, photo, prefix):
        row = torch.full((self.vocab_size,), -10.0)
        row[END if len(prefix) > photo else 4] = -0.01
        return row


@pytest.mark.parametrize("delay, sizes", [(0, [6, 12, 6, 6, 2, 2]), (1, [6, 12, 12, 6, 6, 2, 2])])
def test_finished_photos_leave_the_batch_and_the_search_stops_after_the_last(delay, sizes, monkeypatch):
    """With a delay, one step later."""
    monkeypatch.setattr("captioning.search.end_check.check_delay", lambda device: delay)
    table = EndsAfter(0)
    captions = best_captions(table, make_grid(5, 0, 1, 3, 0, 2), 2, 20)
    assert [len(caption.words) for caption in captions] == [5, 0, 1, 3, 0, 2]
    assert [len(hypotheses) for hypotheses in table.steps] == sizes  # hypotheses: one per photo, then two
    assert all(set(caption.attention[:, 0].tolist()) <= {len(caption.words)} for caption in captions)


class NoValues(TorchDispatchMode):
    """Fails where a value is read from a tensor: on a GPU that would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        assert function is not torch.ops.aten.nonzero.default, "the number of rows is read"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("search", [SearchOptions(1), SearchOptions(4, min_length=2, num_captions=2, beam_groups=2)])
def test_a_search_reads_nothing_but_the_number_of_photos_before_its_end(search, monkeypatch):
    torch.manual_seed(0)
    sizes = dict(vocabulary_size=12, channels=6, embedding_size=5, attention_size=4, hidden_size=7, dropout=0.5)
    decoder = build_decoder("lstm", sizes).eval()
    grid = Grid(torch.randn(6, 64, 6), grid_pooling(8, 8))
    expected = beam_search(decoder, grid, search)  # also makes what is kept from search to search
    numbers = iter([6, 3, 3, 1, *[1] * 50])
    monkeypatch.setattr("captioning.search.end_check._start_reading", lambda number: lambda: next(numbers))
    monkeypatch.setattr(torch, "tensor", lambda *arguments, **settings: pytest.fail("a tensor is made of a list"))
    with torch.no_grad(), NoValues():
        searcher = module._BeamSearch(decoder, search, torch.device("cpu"))
        history, _ = searcher.run(searcher.start(grid))
    assert len(history) == 31 and len(searcher.photos) == 1 and len(expected) == 6


def test_a_finished_hypothesis_does_not_hide_a_better_one_that_ends_later():
    class EndsLater(TableDecoder):
        def make_row(self, photo, prefix):
            row = torch.full((self.vocab_size,), -9.0)
            row[[END, 4]] = torch.tensor([-0.7, -0.5]) if len(prefix) == 1 else torch.tensor([-0.1, -5.0])
            return row

    found = best_captions(EndsLater(0), make_grid(0), 2, 5)[0]
    assert found.words == [4] and found.log_probability == pytest.approx(-0.6)


def test_the_log_probabilities_of_the_decoder_are_not_modified():
    table = TableDecoder(3)
    best_captions(table, make_grid(0, 1), 3, 4)
    assert all(row.equal(table.make_row(photo, list(prefix))) for (photo, *prefix), row in table.rows.items())

    class SharedOutput(EndsAfter):
        """Returns views of one tensor at every step."""

        log_probabilities = torch.full((1, 7), -1.0)

        def step(self, words, state):
            expanded = self.log_probabilities.expand(len(words), -1)
            return super().step(words, state)._replace(log_probabilities=expanded)

    best_captions(SharedOutput(0), make_grid(0, 1), 3, 4)
    assert SharedOutput.log_probabilities.tolist() == [[-1.0] * 7]


@pytest.mark.parametrize("beam_size, max_length", [(0, 5), (3, 0), (-1, 5)])
def test_a_beam_or_a_length_below_one_is_refused(beam_size, max_length):
    with pytest.raises(UserError, match="must be 1 or more"):
        best_captions(TableDecoder(0), make_grid(0), beam_size, max_length)


@pytest.mark.parametrize("length_penalty", [-0.1, float("nan")])
def test_a_length_penalty_below_zero_is_refused(length_penalty):
    with pytest.raises(UserError, match="must be 0 or more"):
        best_captions(TableDecoder(0), make_grid(0), 3, 5, length_penalty)
