"""The transformer against torch's own layers, and what only a transformer promises. Its equations: test_decoders.py."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from captioning.decoders.ensemble import Ensemble
from captioning.decoders.factory import build_decoder, decoder_arguments
from captioning.decoders.transformer import DecoderLayer, EncoderLayer, Packing, TransformerDecoder
from captioning.encoders.grid import Grid, grid_pooling, pooling_matrix
from captioning.errors import UserError
from captioning.runtime.checkpoint import _check_unchanged
from captioning.training.optimizer import learning_rate_factor
from captioning.training.options import TrainingOptions
from tests.test_decoders import LENGTHS, PHOTO, make

SIZE, HEADS, INNER = 8, 2, 12
DROPOUT = nn.Dropout(0.0)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def randomise(module):
    """Random weights and biases, also where they start at zero or one."""
    with torch.no_grad():
        for weights in module.parameters():
            weights.normal_(0, 0.5)
    return module.double()


def copy_weights(layer, attention, projections, output):
    """Load the weights of `projections` (of query, keys and values) and `output` into torch's MultiheadAttention."""
    attention.in_proj_weight.data = torch.cat([projection.weight for projection in projections]).detach()
    attention.in_proj_bias.data = torch.cat([projection.bias for projection in projections]).detach()
    attention.out_proj.load_state_dict(output.state_dict())


def torch_decoder_layer(layer):
    """torch's decoder layer with the weights of ours."""
    theirs = nn.TransformerDecoderLayer(SIZE, HEADS, INNER, 0.0, batch_first=True, norm_first=True).double()
    copy_weights(layer, theirs.self_attn, [layer.query_keys_values], layer.attention_output)
    copy_weights(layer, theirs.multihead_attn, [layer.cell_query, layer.cell_keys_values], layer.cell_attention_output)
    copy_others(layer, theirs, [layer.attention_norm, layer.cell_attention_norm, layer.feed_forward_norm])
    return theirs


def torch_encoder_layer(layer):
    """torch's encoder layer with the weights of ours."""
    theirs = nn.TransformerEncoderLayer(SIZE, HEADS, INNER, 0.0, batch_first=True, norm_first=True).double()
    copy_weights(layer, theirs.self_attn, [layer.query_keys_values], layer.attention_output)
    copy_others(layer, theirs, [layer.attention_norm, layer.feed_forward_norm])
    return theirs


def copy_others(layer, theirs, norms):
    for i, norm in enumerate(norms, 1):
        getattr(theirs, f"norm{i}").load_state_dict(norm.state_dict())
    theirs.linear1.load_state_dict(layer.feed_forward[0].state_dict())
    theirs.linear2.load_state_dict(layer.feed_forward[3].state_dict())


def test_an_encoder_layer_equals_that_of_torch_in_values_and_gradients():
    torch.manual_seed(0)
    layer = randomise(EncoderLayer(SIZE, HEADS, INNER, DROPOUT))
    theirs = torch_encoder_layer(layer)
    cells = torch.randn(3, 5, SIZE, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, SIZE, dtype=torch.float64)
    outputs = layer(cells), theirs(cells)
    assert_equal(*outputs)
    inputs = (cells, layer.query_keys_values.weight, layer.feed_forward[0].weight, layer.attention_norm.weight)
    their_inputs = (cells, theirs.self_attn.in_proj_weight, theirs.linear1.weight, theirs.norm1.weight)
    for found, expected in zip(
        torch.autograd.grad(outputs[0], inputs, upstream),
        torch.autograd.grad(outputs[1], their_inputs, upstream),
        strict=True,
    ):
        assert_equal(found, expected)


def test_a_decoder_layer_on_packed_words_equals_that_of_torch_on_padded_ones():
    """In values and gradients; torch's layer gets a causal mask and the mask of the padding."""
    torch.manual_seed(1)
    layer = randomise(DecoderLayer(SIZE, HEADS, INNER, DROPOUT))
    theirs = torch_decoder_layer(layer)
    words = torch.randn(5, 5, SIZE, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(5, 6, SIZE, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor(LENGTHS)
    packed = pack_padded_sequence(words, lengths, batch_first=True)
    found = layer(packed.data, layer.cell_keys_values(memory), Packing(packed.batch_sizes))
    padded = theirs(
        words,
        memory,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
        tgt_key_padding_mask=(torch.arange(5) >= lengths[:, None]).double() * -1e9,
    )
    expected = pack_padded_sequence(padded, lengths, batch_first=True).data
    assert_equal(found, expected)
    upstream = torch.randn_like(found)
    inputs = (words, memory, layer.query_keys_values.weight, layer.cell_query.weight, layer.feed_forward[3].weight)
    their_inputs = (
        words,
        memory,
        theirs.self_attn.in_proj_weight,
        theirs.multihead_attn.in_proj_weight,
        theirs.linear2.weight,
    )
    gradients = torch.autograd.grad(found, inputs, upstream)
    for ours, other in zip(gradients, torch.autograd.grad(expected, their_inputs, upstream), strict=True):
        assert_equal(ours, other[: len(ours)])  # torch has query, keys and values of the cells in one matrix


@pytest.mark.parametrize("training", [False, True])
def test_a_later_word_changes_nothing_earlier(training):
    decoder, grid, _, words, _ = make("transformer")
    decoder.train(training)
    changed = words.clone()
    changed[:, 3] = 4 + (changed[:, 3] - 3) % 7
    rows = torch.tensor([5, 5, 5, 5, 5])
    logits = []
    for captions in (words, changed):
        packed = pack_padded_sequence(captions[:, :5], rows, batch_first=True)
        logits.append(decoder(grid, packed, PHOTO).logits.view(5, 5, -1))  # (T, R, V)
    assert torch.equal(logits[0][:3], logits[1][:3])
    assert ((logits[0][3:] - logits[1][3:]).abs().amax(2) > 1e-6).all(), "but all later ones"


def test_a_caption_has_the_same_logits_whatever_longer_captions_share_its_batch():
    decoder, grid, _, words, packed = make("transformer")
    together = decoder.eval()(grid, packed, PHOTO).logits
    starts = torch.cat([torch.zeros(1, dtype=torch.long), packed.batch_sizes.cumsum(0)[:-1]])
    for row, length in enumerate(LENGTHS):
        alone = pack_padded_sequence(words[row : row + 1, :length], torch.tensor([length]), batch_first=True)
        assert_equal(decoder(grid, alone, PHOTO[row : row + 1]).logits, together[starts[:length] + row])


def test_dropout_is_that_of_every_layer_and_none_outside_training():
    decoder, grid, _, words, packed = make("transformer")
    decoder.dropout.p = 0.5
    decoder.eval()
    assert torch.equal(decoder(grid, packed, PHOTO).logits, decoder(grid, packed, PHOTO).logits)
    state = decoder.init_state(grid)
    decoder.train()
    assert not torch.equal(decoder(grid, packed, PHOTO).logits, decoder(grid, packed, PHOTO).logits)
    first, second = (decoder.step(words[:3, 0], state).log_probabilities for _ in range(2))
    assert not torch.equal(first, second), "scheduled sampling trains by steps"
    dropouts = {id(module) for module in decoder.modules() if isinstance(module, nn.Dropout)}
    assert dropouts == {id(decoder.dropout)}


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32_and_the_cache_keeps_its_type(precision):
    """As --precision runs it: autocast, with the cells in the same type."""
    decoder, grid, _, words, packed = make("transformer --memory_slots 2")
    decoder = decoder.float().eval()
    grid = Grid(grid.cells.float(), grid.pooling.float())
    expected = decoder(grid, packed, PHOTO).logits
    with torch.autocast("cpu", precision):
        half = Grid(grid.cells.to(precision), grid.pooling)
        torch.testing.assert_close(decoder(half, packed, PHOTO).logits.float(), expected, rtol=0.1, atol=0.05)
        state = decoder.init_state(half.select(PHOTO))
        for number in range(2):
            step = decoder.step(words[:, number], state)
            assert step.log_probabilities.dtype == step.attention.dtype == torch.float32
            assert {tensor.dtype for tensor in state.growing + step.state.growing} == {precision}
            state = step.state


@pytest.mark.parametrize("positions", ["learnt", "sinusoidal"])
def test_positions_tell_every_cell_of_a_map_apart_whatever_its_size(positions):
    module = build_decoder("transformer", settings(positions=positions)).double().positions
    for height, width in ((8, 8), (7, 7), (5, 9), (14, 14), (16, 16)):
        encoded = module(grid_pooling(height, width).double())
        assert encoded.shape == (height * width, 8)
        distances = torch.cdist(encoded, encoded) + torch.eye(len(encoded))
        assert distances.min() > 1e-4


def test_the_position_of_a_native_cell_is_the_mean_of_the_output_cells_that_read_it():
    module = build_decoder("transformer", settings()).double().positions
    rows = pooling_matrix(8, 14)
    first_row = rows[:, 0] / rows[:, 0].sum()
    assert_equal(module(grid_pooling(8, 8).double())[0], first_row @ module.rows + first_row @ module.columns)


def test_cells_without_positions_are_a_set_and_with_positions_are_not():
    for positions, same in (("none", True), ("learnt", False), ("sinusoidal", False)):
        decoder = build_decoder("transformer", settings(positions=positions)).double().eval()
        cells = torch.randn(1, 196, 6, dtype=torch.float64)
        pooling = torch.eye(196, dtype=torch.float64)
        order = torch.randperm(196)
        words = torch.tensor([5])
        first, shuffled = (
            decoder.step(words, decoder.init_state(Grid(part, pooling))).log_probabilities
            for part in (cells, cells[:, order])
        )
        assert torch.allclose(first, shuffled, rtol=0, atol=1e-10) == same


def settings(**own):
    sizes = {"embedding_size": 8, "hidden_size": 8, "layers": 2, "encoder_layers": 1, "heads": 2}
    return {"vocabulary_size": 11, "channels": 6, "feed_forward_size": 12, "dropout": 0.0, **sizes, **own}


def test_the_cache_reordered_with_the_beams_equals_reading_their_words_from_the_start():
    """Also in an ensemble with a decoder that has no cache."""
    members = [make(name, seed)[0].eval() for seed, name in enumerate(("transformer", "adaptive", "transformer"))]
    _, grid, _, words, _ = make("transformer")
    decoder = Ensemble(members)
    prefixes = torch.cat([words, words[:1].flip(1)])[:, :3]  # of two beams for each of three photos
    rows = torch.tensor([1, 1, 3, 2, 4, 4])  # the parents of the beams
    start = decoder.init_state(grid).reorder(torch.tensor([0, 0, 1, 1, 2, 2]))

    def read(state, captions):
        for number in range(captions.shape[1]):
            step = decoder.step(captions[:, number], state)
            state = step.state
        return step

    state = read(start, prefixes).state.reorder(rows)
    found = read(state, prefixes[:, :1])
    expected = read(start, torch.cat([prefixes[rows], prefixes[:, :1]], 1))
    assert_equal(found.log_probabilities, expected.log_probabilities)
    assert_equal(found.attention, expected.attention)
    kept = state.select(torch.tensor([2, 0]), torch.tensor([4, 5, 0, 1]))  # photos leave a search
    found = decoder.step(prefixes[torch.tensor([4, 5, 0, 1]), 0], kept)
    assert_equal(found.log_probabilities, expected.log_probabilities[torch.tensor([4, 5, 0, 1])])


def test_a_heads_number_that_does_not_divide_the_hidden_size_is_refused():
    with pytest.raises(UserError, match="--heads 3: must divide --hidden-size, now 8"):
        build_decoder("transformer", settings(heads=3))


def test_settings_that_are_not_given_have_the_published_value_of_the_decoder():
    options = vars(TrainingOptions("data", "run", decoder="transformer"))
    arguments = decoder_arguments("transformer", options)
    assert arguments["dropout"] == 0.1 and arguments["layers"] == 3 and arguments["heads"] == 8
    assert arguments["encoder_layers"] == 3 and arguments["feed_forward_size"] == 2048
    defaults = inspect.signature(TransformerDecoder).parameters
    assert all(value == defaults[name].default for name, value in arguments.items()), "two places, one value"
    assert decoder_arguments("attention", options)["dropout"] == 0.5
    lstm = decoder_arguments("lstm", options)
    assert lstm["dropout"] == 0.5 and lstm["layers"] == 1
    assert decoder_arguments("lstm", options | {"layers": 2})["layers"] == 2


def test_a_run_of_before_the_defaults_depended_on_the_decoder_resumes_without_them():
    _check_unchanged("dropout", None, 0.5, Path("run"))
    _check_unchanged("layers", None, 1, Path("run"))
    with pytest.raises(UserError, match="trained with 0.3"):
        _check_unchanged("dropout", None, 0.3, Path("run"))


@pytest.mark.parametrize(
    "given, flag",
    [
        ({"heads": 4}, "--heads requires --decoder transformer"),
        ({"encoder_layers": 0}, "--encoder-layers requires --decoder transformer"),
        ({"decoder": "lstm", "positions": "none"}, "--positions requires --decoder attention, .* or aoa"),
        ({"layers": 2}, "--layers requires --decoder lstm or transformer"),
        ({"decoder": "transformer", "cell": "gru"}, "--cell requires --decoder lstm"),
        ({"decoder": "transformer", "memory_slots": -1}, "--memory-slots -1: must be 0 or more"),
        ({"decoder": "transformer", "heads": 0}, "--heads 0: must be 1 or more"),
    ],
)
def test_settings_of_another_decoder_are_refused(given, flag):
    with pytest.raises(UserError, match=f"^{flag}"):
        TrainingOptions("data", "run", **given)


def test_the_inverse_square_root_schedule_is_that_of_vaswani():
    """d^-0.5 min(n^-0.5, n w^-1.5) (eq. 3), relative to its largest value, with 10 updates n per epoch."""
    options = TrainingOptions("data", "run", schedule="inverse-sqrt", warmup_epochs=2.0)
    peak = 20**-0.5
    for update in range(1, 200):
        expected = min(update**-0.5, update * 20**-1.5) / peak
        assert learning_rate_factor(options, update / 10, update / 10) == pytest.approx(expected)


def test_the_inverse_square_root_schedule_without_warm_up_starts_at_the_full_rate():
    options = TrainingOptions("data", "run", schedule="inverse-sqrt")
    factors = [learning_rate_factor(options, epoch, epoch + 0.1) for epoch in (0.0, 1.0, 4.0)]
    assert factors == [1.0, 1.0, 0.5]
