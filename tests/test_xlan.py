"""X-LAN beyond what tests/test_decoders.py promises of every decoder: its encoder, and its attention on the grid."""

import pytest
import torch

from captioning.decoders.factory import build_decoder
from captioning.decoders.protocol import spread_attention
from captioning.encoders.grid import Grid, grid_pooling
from captioning.errors import UserError
from config import Train
from tests import test_decoders
from tests.test_decoders import SIZES, make


def test_without_encoder_layers_it_equals_the_equations_too():
    test_decoders.test_logits_and_gradients_equal_the_equations_word_by_word("xlan --encoder_layers 0")


def test_each_encoder_layer_relates_every_cell_to_every_other():
    """With one layer, a change of the last cell changes all k; without layers, only its own."""
    for layers, changed in ((0, 1), (1, 64)):
        decoder, grid, *_ = make(f"xlan --encoder_layers {layers}")
        cells = grid.cells.clone()
        cells[:, -1] += 1
        before, after = (decoder.eval()._encode(each)[0] for each in (grid, Grid(cells, grid.pooling)))
        assert ((before - after).abs().amax(2) > 1e-9).sum(1).tolist() == [changed] * 3


@pytest.mark.parametrize("height, width", [(8, 8), (7, 7), (5, 12), (14, 14), (16, 16)])
def test_the_attention_shown_sums_to_one_and_equal_attention_stays_equal(height, width):
    pooling = grid_pooling(height, width).double().expand(2, -1, -1)
    attention = torch.randn(6, height * width, dtype=torch.float64).softmax(1)  # three captions per photo
    shown = spread_attention(attention.view(2, 3, -1), pooling)
    assert shown.shape == (6, 196) and (shown >= 0).all()
    torch.testing.assert_close(shown.sum(1), torch.ones(6, dtype=torch.float64))
    equal = spread_attention(torch.full_like(attention, 1 / (height * width)).view(2, 3, -1), pooling)
    torch.testing.assert_close(equal, torch.full_like(equal, 1 / 196))


def test_in_bfloat16_the_attention_shown_sums_to_one_and_the_state_keeps_its_types():
    """The static tensors of CUDA graphs need the latter."""
    decoder, grid, _, words, _ = make("xlan")
    decoder, grid = decoder.float().eval(), Grid(grid.cells.float(), grid.pooling.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = decoder.init_state(grid)
        step = decoder.step(words[:3, 0], state)
    torch.testing.assert_close(step.attention.sum(1), torch.ones(3))
    for before, after in zip(state.per_caption, step.state.per_caption, strict=True):
        assert before.dtype == after.dtype == torch.float32


def test_an_attention_size_that_the_heads_do_not_divide_is_refused_in_one_line():
    with pytest.raises(UserError, match="--attention-size 36: must be a multiple of 16, two times --heads") as error:
        build_decoder("xlan", {**SIZES, "attention_size": 36, "heads": 8})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["heads", "encoder_layers"])
def test_flags_of_xlan_are_refused_for_decoders_without_them(flag):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} requires --decoder .*xlan"):
        Train("data", "run", **{flag: 1})
    assert getattr(Train("data", "run", decoder="xlan", **{flag: 1}), flag) == 1
