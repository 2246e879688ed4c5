"""Captions and words that a decoder draws itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from captioning.decoders import DECODERS
from captioning.encoders.grid import Grid
from captioning.search import sampling
from captioning.search.beam_search import banned_ids, beam_search
from captioning.search.options import SearchOptions
from captioning.search.sampling import (
    deterministic,
    sample_captions,
    nucleus_filter,
    pack_sampled,
    sample,
    scheduled_sampling_forward,
)
from preprocess.vocabulary import END, PAD, START, UNKNOWN
from tests.test_beam_search import Table, grid_of, log_probability
from tests.test_decoders import PHOTO, VARIANTS, make


def probability(decoder, grid, words):
    """Of a caption of photo 0, <end> among its words where it ended."""
    state, probability = decoder.init_state(grid.select(torch.tensor([0]))), 1.0
    for read, said in zip([START, *words], words, strict=False):
        log_probabilities, _, state, _ = decoder.step(torch.tensor([read]), state)
        allowed = log_probabilities[0].index_fill(0, torch.tensor([PAD, UNKNOWN, START]), -torch.inf).softmax(0)
        probability *= float(allowed[said])
    return probability


@torch.no_grad()
def test_captions_are_drawn_as_often_as_they_are_likely():
    decoder, grid, *_ = make("lstm")
    decoder.eval().output_layer.bias[torch.arange(11) > 5] = -9  # so that few captions are likely
    torch.manual_seed(1)
    drawn = sample(decoder, grid, 6000, 2)
    assert drawn.shape == (3, 6000, 3)
    found, counts = drawn[0].unique(dim=0, return_counts=True)
    shares = {tuple(row.tolist()): count / 6000 for row, count in zip(found, counts.tolist(), strict=True)}
    common = {row: share for row, share in shares.items() if share > 0.02}
    assert len(common) > 4 and sum(common.values()) > 0.9
    for row, share in common.items():
        expected = probability(decoder, grid, [word for word in row if word != PAD])
        assert share == pytest.approx(expected, abs=4 * (expected / 6000) ** 0.5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_captions_are_words_then_an_end_then_padding(variant):
    decoder, grid, *_ = make(variant)
    torch.manual_seed(2)
    drawn = sample(decoder.eval(), grid, 200, 4).flatten(0, 1)
    assert not ((drawn == UNKNOWN) | (drawn == START)).any()
    for caption in drawn.tolist():
        words = caption[: caption.index(END) if END in caption else len(caption)]
        assert PAD not in words and set(caption[len(words) + 1 :]) <= {PAD}
    assert (drawn == END).any(1).float().mean() > 0.1 and (drawn[:, 0] == END).any()


@pytest.mark.parametrize("name", DECODERS)
def test_the_first_caption_of_a_photo_is_the_greedy_one_where_it_is_wanted(name):
    decoder, grid, *_ = make(name)
    with torch.no_grad():
        decoder.output_layer.weight.mul_(5)
    decoder, grid = decoder.float().eval(), Grid(grid.cells.float(), grid.pooling.float())
    drawn = sample(decoder, grid, 3, 5, greedy_first=True)
    assert drawn.shape[:2] == (3, 4)
    for caption, (greedy,) in zip(drawn[:, 0].tolist(), beam_search(decoder, grid, SearchOptions(1, 5)), strict=True):
        words = caption[: caption.index(END)] if END in caption else caption[:5]
        assert words == greedy.words and (END in caption) == greedy.finished


def test_drawn_captions_are_read_from_start_and_said_to_their_end():
    captions = torch.tensor([[5, END, PAD, PAD], [5, 6, 7, 8], [END, PAD, PAD, PAD], [9, 10, END, PAD]])
    words, said, order = pack_sampled(captions)
    assert order.tolist() == [1, 3, 0, 2] and words.batch_sizes.tolist() == [4, 3, 2, 1]
    assert words.data.tolist() == [START, START, START, START, 5, 9, 5, 6, 10, 7]
    assert said.tolist() == [5, 9, 5, END, 6, 10, END, 7, END, 8]


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_no_own_words_is_teacher_forcing(variant):
    decoder, grid, _, _, packed = make(variant)
    decoder.eval()
    ours, forced = scheduled_sampling_forward(decoder, grid, packed, PHOTO, 0.0), decoder(grid, packed, PHOTO)
    torch.testing.assert_close(ours.logits, forced.logits.log_softmax(1))
    assert (ours.attention_sum is None) == (forced.attention_sum is None)
    if forced.attention_sum is not None:
        torch.testing.assert_close(ours.attention_sum, forced.attention_sum)


@pytest.mark.parametrize("variant", VARIANTS)
def test_own_words_are_read_as_often_as_asked_and_as_likely_as_they_are(variant, monkeypatch):
    decoder, grid, _, _, packed = make(variant)
    read, said = [], []
    step = decoder.step

    def spy(words, state):
        read.append(words)
        said.append(step(words, state))
        return said[-1]

    monkeypatch.setattr(decoder.eval(), "step", spy)
    monkeypatch.setattr(sampling, "sample_categorical", lambda shares: shares.argmax(1))
    scheduled_sampling_forward(decoder, grid, packed, PHOTO, 1.0)
    assert torch.equal(read[0], packed.data[: len(read[0])]), "the first word is the true one"
    for words, before in zip(read[1:], said, strict=False):
        assert torch.equal(words, before.log_probabilities.argmax(1)[: len(words)])
    own = 0
    for _ in range(60):
        read.clear()
        scheduled_sampling_forward(decoder, grid, packed, PHOTO, 0.3)
        own += int((torch.cat(read) != packed.data).sum())
    assert 0.15 < own / (60 * (len(packed.data) - 5)) < 0.35, "some of the own words are the true ones"


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_chance_a_decoder_in_training_says_what_it_says_when_it_captions(variant):
    decoder, grid, _, _, packed = make(variant)
    decoder.dropout.p = 0.5
    if isinstance(getattr(decoder, "recurrent", None), nn.RNNBase) and decoder.recurrent.num_layers > 1:
        decoder.recurrent.dropout = 0.5
    expected = decoder.eval()(grid, packed, PHOTO).logits
    decoder.train()
    with deterministic(decoder):
        assert torch.equal(decoder(grid, packed, PHOTO).logits, expected)
    assert all(part.training for part in decoder.modules())
    with deterministic(decoder, keep_dropout=True):
        assert not torch.equal(decoder(grid, packed, PHOTO).logits, expected)
        assert decoder(grid, packed, PHOTO).samples is None, "dropout is the only chance"
        decoder.dropout.p = 0.0
        if hasattr(decoder, "recurrent"):
            decoder.recurrent.dropout = 0.0
        assert torch.equal(decoder(grid, packed, PHOTO).logits, expected), "dropout is the only chance"
    decoder.dropout.p = 0.5
    assert not torch.equal(decoder(grid, packed, PHOTO).logits, expected), "chance is back"
    assert banned_ids(torch.device("cpu")).tolist() == [PAD, UNKNOWN, START]


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.2, 3), st.floats(0.05, 1))
def test_the_words_to_draw_from_are_the_papers(seed, temperature, top_p):
    log_probabilities = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed)).double().log_softmax(1)
    log_probabilities[0, 3] = -torch.inf
    for row, found in zip(log_probabilities, nucleus_filter(log_probabilities, temperature, top_p).exp(), strict=True):
        shares = row.exp().numpy() ** (1 / temperature)
        shares /= shares.sum()
        nucleus, reached = np.zeros(9), 0.0
        for word in np.argsort(-shares):  # the smallest set of words whose shares reach top_p
            if reached < top_p:
                nucleus[word], reached = shares[word], reached + shares[word]
        np.testing.assert_allclose(found.numpy(), nucleus / nucleus.sum(), atol=1e-9)


def test_drawn_captions_come_as_often_as_temperature_and_top_p_say():
    table, search = Table(3, end=-0.3), SearchOptions(num_captions=20_000, max_length=1, temperature=0.7, top_p=0.8)
    torch.manual_seed(0)
    (found,) = sample_captions(table, grid_of(0), search)
    row = table.row(0, [START]).index_fill(0, torch.tensor([PAD, UNKNOWN, START]), -torch.inf)
    expected = nucleus_filter(row[None], 0.7, 0.8).exp()[0]
    firsts = torch.tensor([caption.words[0] if caption.words else END for caption in found])
    shares = torch.bincount(firsts, minlength=len(row)) / len(found)
    torch.testing.assert_close(shares, expected, atol=0.012, rtol=0)
    for caption in found[:50]:
        own = log_probability(table, 0, caption.words, caption.finished)
        assert caption.log_probability == pytest.approx(own, abs=1e-5)
        assert caption.finished or len(caption.words) == 1
        assert len(caption.attention) == len(caption.words)


def test_a_temperature_near_zero_draws_the_greedy_caption():
    table = Table(4, end=-0.5)
    drawn = sample_captions(table, grid_of(0, 1), SearchOptions(num_captions=3, max_length=5, temperature=1e-4))
    for captions, (greedy,) in zip(drawn, beam_search(table, grid_of(0, 1), SearchOptions(1, 5)), strict=True):
        assert [caption.words for caption in captions] == [greedy.words] * 3


def test_a_drawing_is_as_likely_as_its_share():
    torch.manual_seed(0)
    shares = torch.tensor([[0.5, 0.2, 0.0, 0.3], [0.0, 0.0, 1.0, 0.0]])
    drawn = sampling.sample_categorical(shares.expand(20000, 2, 4))
    assert drawn.shape == (20000, 2) and drawn.dtype == torch.int64
    for places, share in zip(drawn.T, shares, strict=True):
        torch.testing.assert_close(places.bincount(minlength=4) / 20000, share, rtol=0, atol=0.015)
