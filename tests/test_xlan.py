"""X-LAN beyond what tests/test_decoders.py promises of every decoder: its encoder and its settings."""

import pytest

from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import Grid
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


def test_an_attention_size_that_the_heads_do_not_divide_is_refused_in_one_line():
    with pytest.raises(UserError, match="--attention-size 36: must be a multiple of 16, two times --heads") as error:
        build_decoder("xlan", {**SIZES, "attention_size": 36, "heads": 8})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["heads", "encoder_layers"])
def test_flags_of_xlan_are_refused_for_decoders_without_them(flag):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} requires --decoder .*xlan"):
        Train("data", "run", **{flag: 1})
    assert getattr(Train("data", "run", decoder="xlan", **{flag: 1}), flag) == 1
