"""UpDown beyond what tests/test_decoders.py promises of every decoder."""

import torch

from tests.test_decoders import make


def first_attention(name, word):
    decoder, grid, *_ = make(name)
    return decoder.eval().step(torch.full((3,), word), decoder.init_state(grid)).attention


def test_the_word_just_read_decides_where_it_looks():
    """Its query is the hidden state after that word; soft attention's is the one before."""
    assert torch.equal(first_attention("attention", 4), first_attention("attention", 5))
    assert (first_attention("updown", 4) - first_attention("updown", 5)).abs().max() > 1e-6
