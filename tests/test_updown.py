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


def test_in_bfloat16_its_state_keeps_its_types():
    """The static tensors of CUDA graphs need it."""
    decoder, grid, _, words, _ = make("updown")
    decoder, grid.cells, grid.pooling = decoder.float().eval(), grid.cells.float(), grid.pooling.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = decoder.init_state(grid)
        step = decoder.step(words[:3, 0], state)
    for before, after in zip(state.per_caption, step.state.per_caption, strict=True):
        assert before.dtype == after.dtype == torch.float32
