"""AoANet beyond what tests/test_decoders.py promises of every decoder: its encoder and its settings."""

import pytest
import torch

from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import Grid
from captioning.errors import UserError
from tests import test_decoders
from tests.test_decoders import PHOTO, SIZES, make


def test_without_encoder_layers_it_equals_the_equations_too():
    test_decoders.test_logits_and_gradients_equal_the_equations_word_by_word("aoa --encoder_layers 0")


def test_each_encoder_layer_relates_every_cell_to_every_other():
    """With one layer, a change of the last cell changes all of A; without layers, only its own."""
    for layers, changed in ((0, 1), (1, 64)):
        decoder, grid, *_ = make(f"aoa --encoder_layers {layers}")
        cells = grid.cells.clone()
        cells[:, -1] += 1
        before, after = (decoder.eval().encode(each) for each in (grid, Grid(cells, grid.pooling)))
        assert ((before - after).abs().amax(2) > 1e-9).sum(1).tolist() == [changed] * 3


def test_a_later_word_changes_no_earlier_logits():
    decoder, grid, _, _, packed = make("aoa")
    later = packed.data.clone()
    last = int(packed.batch_sizes[:3].sum())  # the words from the fourth on
    later[last:] = (later[last:] - 3) % 7 + 4  # another of the words 4 to 10
    before, after = (decoder.eval()(grid, packed._replace(data=data), PHOTO).logits for data in (packed.data, later))
    assert torch.equal(before[:last], after[:last]) and (before[last:] - after[last:]).abs().amax(1).min() > 1e-6


def test_a_hidden_size_that_the_heads_do_not_divide_is_refused_in_one_line():
    with pytest.raises(UserError, match="--heads 8: must divide --hidden-size, now 7") as error:
        build_decoder("aoa", {**SIZES, "heads": 8})
    assert "\n" not in str(error.value)
