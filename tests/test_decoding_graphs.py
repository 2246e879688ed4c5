"""Searches whose steps are repeated as CUDA graphs, against the same searches without; a CPU repeats the work."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from captioning.decoders.ensemble import Ensemble
from captioning.encoders.grid import Grid
from captioning.runtime.cuda_graphs import CaptureError, GraphCapture
from captioning.search import graphs as module
from captioning.search.beam_search import beam_search
from captioning.search.graphs import DecodingGraphs, map_tensors, padded_size, tensors_of
from captioning.search.options import SearchOptions
from captioning.search.sampling import sample, sample_captions
from preprocess.vocabulary import END, PAD
from tests.test_decoders import VARIANTS, make

SEARCHES = {
    "greedy": SearchOptions(1, 11),
    "beam 3": SearchOptions(3, 11),
    "beam 5, length penalty": SearchOptions(5, 11, length_penalty=0.7),
    "min_length": SearchOptions(3, 9, min_length=6),
    "no_repeat_ngram": SearchOptions(3, 11, no_repeat_ngram=2),
    "groups": SearchOptions(4, 8, num_captions=4, beam_groups=2),
    "several captions": SearchOptions(4, 8, num_captions=3),
    "wider than the vocabulary": SearchOptions(30, 5),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Repeat:
    """In place of CUDA graphs: repeat the work on the same tensors."""

    def __init__(self):
        self.captures = 0
        self.replays = 0

    def __call__(self, work):
        self.captures += 1

        def replay():
            self.replays += 1
            return work()

        return replay


def make_sharp(variant, end=0.5):
    """A decoder in float64 whose captions differ and end at different steps, and the grid of 16 photos."""
    decoder, grid, *_ = make(variant, seed=2 if variant == "xlan" else 0)  # with 0 its captions are all empty
    with torch.no_grad():
        for name, weights in decoder.named_parameters():
            if "norm." not in name:  # those of a LayerNorm would keep a transformer from telling photos apart
                weights.normal_(0, 1.5)
        decoder.output_layer.bias[END] = end
    torch.manual_seed(1)
    shape = grid.cells.shape[1:]
    cells = torch.randn(16, *shape, dtype=torch.float64) + 3 * torch.randn(16, 1, shape[1], dtype=torch.float64)
    return decoder.eval(), Grid(cells, grid.pooling)


def first_photos(grid, number):
    return Grid(grid.cells[:number], grid.pooling)


def assert_same_captions(found, expected):
    assert len(found) == len(expected)
    for found_captions, expected_captions in zip(found, expected, strict=True):
        assert [(c.words, c.finished) for c in found_captions] == [(c.words, c.finished) for c in expected_captions]
        for one, other in zip(found_captions, expected_captions, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-6)
            assert (one.attention is None) == (other.attention is None)
            if one.attention is not None:
                torch.testing.assert_close(one.attention, other.attention)


def trimmed(captions):
    """(B, K, T) as lists without padding: a graph runs to the end of its last block."""
    return [[[word for word in caption if word != PAD] for caption in photo] for photo in captions.tolist()]


# ---- beam search


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_beam_search_in_graphs_finds_what_it_finds_without(search):
    """Also in batches smaller than the static one, after others, and in reused graphs."""
    decoder, grid = make_sharp("attention")
    capture = Repeat()
    graphs = DecodingGraphs(capture)
    for photos in (13, 5, 14, 1, 13, 5):
        batch = first_photos(grid, photos)
        expected = beam_search(decoder, batch, search)
        assert_same_captions(beam_search(decoder, batch, search, graphs), expected)
    if search.beam_size < 30:
        assert len(graphs.loops) == 3, "13 and 14 photos share their static tensors"
        assert capture.captures and capture.replays
    else:
        assert not graphs.loops, "its shapes grow from step to step"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_decoder_can_be_searched_in_graphs(variant):
    decoder, grid = make_sharp(variant)
    graphs = DecodingGraphs(Repeat())
    for photos in (15, 16, 15, 15):
        batch = first_photos(grid, photos)
        expected = beam_search(decoder, batch, SEARCHES["beam 3"])
        assert_same_captions(beam_search(decoder, batch, SEARCHES["beam 3"], graphs), expected)
    assert len({tuple(caption.words) for (caption,) in expected}) > 1


def test_an_ensemble_can_be_searched_in_graphs():
    (first, grid), (second, _) = make_sharp("attention"), make_sharp("lstm")
    ensemble = Ensemble([first, second])
    graphs = DecodingGraphs(Repeat())
    expected = beam_search(ensemble, grid, SEARCHES["beam 3"])
    for _ in range(3):
        assert_same_captions(beam_search(ensemble, grid, SEARCHES["beam 3"], graphs), expected)


@pytest.mark.parametrize("end, blocks", [(30.0, 1), (-30.0, 3)])
def test_blocks_run_until_all_captions_have_ended_or_max_length_is_reached(end, blocks):
    decoder, grid = make_sharp("lstm", end)
    capture = Repeat()
    graphs = DecodingGraphs(capture)
    for _ in range(3):
        captions = beam_search(decoder, grid, SEARCHES["greedy"], graphs)
    assert capture.captures == blocks and capture.replays == 2 * blocks
    lengths = {len(caption.words) for (caption,) in captions}
    assert lengths == ({0} if end > 0 else {11}) and all(caption.finished == (end > 0) for (caption,) in captions)


def test_a_graph_that_is_needed_later_is_captured_later():
    decoder, grid = make_sharp("lstm", 30.0)
    capture = Repeat()
    graphs = DecodingGraphs(capture)
    counts = []
    for end in (30.0, 30.0, -30.0, -30.0, 30.0, -30.0):
        decoder.output_layer.bias.data[END] = end
        expected = beam_search(decoder, grid, SEARCHES["greedy"])
        assert_same_captions(beam_search(decoder, grid, SEARCHES["greedy"], graphs), expected)
        counts.append(capture.captures)
    assert counts == [0, 1, 1, 3, 3, 3]


def test_a_graph_reads_the_weights_as_they_are_when_it_runs():
    decoder, grid = make_sharp("attention")
    graphs = DecodingGraphs(Repeat())
    found = []
    for _ in range(4):
        expected = beam_search(decoder, grid, SEARCHES["beam 3"])
        assert_same_captions(beam_search(decoder, grid, SEARCHES["beam 3"], graphs), expected)
        found.append([caption.words for (caption,) in expected])
        with torch.no_grad():
            decoder.output_layer.bias.add_(torch.randn(11, dtype=torch.float64))
    assert found[0] != found[-1]


def test_one_pooling_for_all_photos_stays_one_in_the_static_tensors():
    decoder, grid = make_sharp("attention")
    graphs = DecodingGraphs(Repeat())
    beam_search(decoder, grid, SEARCHES["greedy"], graphs)
    (loop,) = graphs.loops.values()
    assert [tensor.shape for tensor in tensors_of(loop.carry) if tensor.stride(0) == 0] == [(16, 196, 64)]


def test_more_shapes_than_are_kept_run_without_graphs(monkeypatch):
    monkeypatch.setattr(module, "MAX_SHAPES", 1)
    decoder, grid = make_sharp("lstm")
    graphs = DecodingGraphs(Repeat())
    for photos in (16, 3, 3, 3, 16, 16):
        batch = first_photos(grid, photos)
        expected = beam_search(decoder, batch, SEARCHES["beam 3"])
        assert_same_captions(beam_search(decoder, batch, SEARCHES["beam 3"], graphs), expected)
    assert len(graphs.loops) == 1


@pytest.mark.parametrize("error", [CaptureError, torch.OutOfMemoryError])
def test_what_cannot_be_captured_runs_without_graphs_and_one_line_says_so(capsys, error):
    attempts = []

    def capture(work):
        attempts.append(work)
        raise error("no graph today")

    decoder, grid = make_sharp("attention")
    graphs = DecodingGraphs(capture)
    expected = beam_search(decoder, grid, SEARCHES["beam 3"])
    for _ in range(4):
        assert_same_captions(beam_search(decoder, grid, SEARCHES["beam 3"], graphs), expected)
    assert capsys.readouterr().out == "captions are searched without CUDA graphs, which is slower: no graph today\n"
    assert len(attempts) == 1


@pytest.mark.parametrize("wrong_from", [1, 5])
def test_a_graph_whose_first_results_are_wrong_is_not_used(capsys, wrong_from):
    """Also with samples, whose random numbers it may have drawn."""
    captures = []

    def capture(work):
        captures.append(work)
        return work if len(captures) < wrong_from else lambda: map_tensors(torch.zeros_like, work())

    decoder, grid = make_sharp("attention", end=-1.0)
    graphs = DecodingGraphs(capture)
    for seed in range(4):
        torch.manual_seed(seed)
        expected = sample(decoder, grid, 3, 19)
        torch.manual_seed(seed)
        assert trimmed(sample(decoder, grid, 3, 19, graphs=graphs)) == trimmed(expected)
    out = capsys.readouterr().out
    assert out.startswith("captions are searched without CUDA graphs, which is slower: ") and out.count("\n") == 1
    assert "% of the results of a graph are not those of the same work without it" in out
    assert len(captures) == wrong_from and not any(loop.replays for loop in graphs.loops.values())


class Conversions(TorchDispatchMode):
    """Counts conversions of float32 weights to bfloat16."""

    def __init__(self, weights):
        super().__init__()
        self.addresses = {weight.data_ptr() for weight in weights}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        converted = function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.addresses
        self.count += converted
        return function(*args, **(kwargs or {}))


def test_weights_that_autocast_converted_are_not_shared_between_a_graph_and_other_work():
    """Those converted before a graph are freed, and those converted in a graph have no values outside of it."""
    decoder, grid = make_sharp("attention")
    decoder, grid = decoder.float(), Grid(grid.cells.float(), grid.pooling.float())
    weight = decoder.output_layer.weight
    counts = []

    def capture(work):
        with Conversions([weight]) as conversions:
            result = work()
        counts.append(conversions.count)
        with torch.no_grad(), Conversions([weight]) as conversions:
            decoder.output_layer(torch.zeros(1, 7))
        counts.append(conversions.count)
        return lambda: result

    graphs = DecodingGraphs(capture)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            beam_search(decoder, grid, SearchOptions(1, 4), graphs)
    assert counts == [1, 1], "once in the block, though it was converted before; and once after it"


@pytest.mark.parametrize(
    "photos, size", [(1, 1), (7, 7), (8, 8), (9, 10), (13, 14), (17, 20), (33, 40), (398, 448), (402, 448), (449, 512)]
)
def test_batches_are_padded_to_few_sizes(photos, size):
    assert padded_size(photos) == size and padded_size(size) == size


# ---- sampling


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("greedy_first", [False, True])
def test_sampling_in_graphs_draws_the_captions_that_it_draws_without(variant, greedy_first):
    """With the same random numbers, if the batch is not padded."""
    decoder, grid = make_sharp(variant, end=1.0)
    graphs = DecodingGraphs(Repeat())
    for seed in range(3):
        torch.manual_seed(seed)
        expected = sample(decoder, grid, 3, 9, greedy_first)
        torch.manual_seed(seed)
        assert trimmed(sample(decoder, grid, 3, 9, greedy_first, graphs)) == trimmed(expected)
    assert len({tuple(caption) for photo in trimmed(expected) for caption in photo}) > 5


def test_the_state_of_a_decoder_may_change_its_dtype_in_the_first_step():
    """As in bfloat16 on a GPU, where cuDNN's recurrent networks compute in float16."""

    class Narrow(torch.nn.Module):
        def __init__(self, decoder):
            super().__init__()
            self.decoder = decoder

        def init_state(self, grid):
            return map_tensors(torch.Tensor.float, self.decoder.init_state(grid))

        def step(self, words, state):
            return self.decoder.step(words, map_tensors(torch.Tensor.double, state))

    decoder, grid = make_sharp("lstm")
    narrow = Narrow(decoder)
    graphs = DecodingGraphs(Repeat())
    for seed in range(3):
        torch.manual_seed(seed)
        expected = trimmed(sample(narrow, grid, 2, 11))
        torch.manual_seed(seed)
        assert trimmed(sample(narrow, grid, 2, 11, graphs=graphs)) == expected


def test_sampled_captions_in_graphs_have_the_probabilities_and_attention_of_their_words():
    decoder, grid = make_sharp("adaptive", end=1.0)
    search = SearchOptions(num_captions=3, max_length=9, temperature=0.8, top_p=0.9)
    graphs = DecodingGraphs(Repeat())
    for seed in range(3):
        torch.manual_seed(seed)
        expected = sample_captions(decoder, grid, search)
        torch.manual_seed(seed)
        assert_same_captions(sample_captions(decoder, grid, search, graphs), expected)


def test_sampling_is_a_function_of_seed_and_batch_whatever_was_captured_before():
    """So that a resumed run, whose graphs are captured anew, repeats an uninterrupted one; also in a padded batch."""
    decoder, grid = make_sharp("attention", end=1.0)
    batch = first_photos(grid, 13)

    def draw(graphs):
        torch.manual_seed(5)
        return sample(decoder, batch, 3, 9, True, graphs), torch.get_rng_state()

    capture = Repeat()
    used = DecodingGraphs(capture)
    sample(decoder, grid, 3, 9, True, used)
    first, state = draw(used)
    for graphs in (used, used, DecodingGraphs(Repeat())):
        again, state_again = draw(graphs)
        assert torch.equal(first, again) and torch.equal(state, state_again)
    assert capture.replays
    greedy = sample(decoder, batch, 0, 9, True)
    assert trimmed(first[:, :1]) == trimmed(greedy)


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_graphs_find_what_a_search_without_them_finds(variant, precision):
    decoder, grid = make_sharp(variant)
    decoder = decoder.float().cuda()
    grid = Grid(grid.cells.float().cuda(), grid.pooling.float().cuda())
    graphs = DecodingGraphs(GraphCapture())
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        for search in (SEARCHES["greedy"], SEARCHES["beam 3"]):
            for photos in (16, 13, 16, 13, 16, 13):
                batch = first_photos(grid, photos)
                found = beam_search(decoder, batch, search, graphs)
                expected = beam_search(decoder, batch, search)
                same = [a.words == b.words for (a,), (b,) in zip(found, expected, strict=True)]
                assert sum(same) >= len(same) - 1, "rounding may decide between two words"
        for seed in range(4):
            torch.manual_seed(seed)
            first = sample(decoder, grid, 3, 9, True, graphs)
            torch.manual_seed(seed)
            assert trimmed(sample(decoder, grid, 3, 9, True, DecodingGraphs(lambda work: work))) == trimmed(first)
