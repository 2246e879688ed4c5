"""Sampling: whole captions, and the input words of scheduled sampling."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from captioning.decoders import DECODERS
from captioning.encoders.grid import Grid
from captioning.search import sampling
from captioning.search.beam_search import banned_ids, beam_search
from captioning.search.options import SearchOptions
from captioning.search.sampling import (
    deterministic,
    nucleus_filter,
    pack_sampled,
    sample,
    sample_captions,
    scheduled_sampling_forward,
)
from preprocess.vocabulary import END, PAD, START, UNKNOWN
from tests.test_beam_search import TableDecoder, log_probability, make_grid
from tests.test_decoders import PHOTO, VARIANTS, make


def probability(decoder, grid, words):
    """The probability of a caption of photo 0; `words` include its <end>, if any."""
    state = decoder.init_state(grid.select(torch.tensor([0])))
    probability = 1.0
    for previous, word in zip([START, *words], words, strict=False):
        log_probabilities, _, state, _ = decoder.step(torch.tensor([previous]), state)
        allowed = log_probabilities[0].index_fill(0, torch.tensor([PAD, UNKNOWN, START]), -torch.inf).softmax(0)
        probability *= float(allowed[word])
    return probability


@torch.no_grad()
def test_captions_are_sampled_with_their_probability():
    decoder, grid, *_ = make("lstm")
    decoder.eval().output_layer.bias[torch.arange(11) > 5] = -9  # makes few captions likely
    torch.manual_seed(1)
    samples = sample(decoder, grid, 6000, 2)
    assert samples.shape == (3, 6000, 3)
    unique, counts = samples[0].unique(dim=0, return_counts=True)
    frequencies = {tuple(row.tolist()): count / 6000 for row, count in zip(unique, counts.tolist(), strict=True)}
    common = {row: frequency for row, frequency in frequencies.items() if frequency > 0.02}
    assert len(common) > 4 and sum(common.values()) > 0.9
    for row, frequency in common.items():
        expected = probability(decoder, grid, [word for word in row if word != PAD])
        assert frequency == pytest.approx(expected, abs=4 * (expected / 6000) ** 0.5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sampled_captions_are_words_then_end_then_padding(variant):
    decoder, grid, *_ = make(variant)
    torch.manual_seed(2)
    samples = sample(decoder.eval(), grid, 200, 4).flatten(0, 1)
    assert not ((samples == UNKNOWN) | (samples == START)).any()
    for caption in samples.tolist():
        words = caption[: caption.index(END) if END in caption else len(caption)]
        assert PAD not in words and set(caption[len(words) + 1 :]) <= {PAD}
    assert (samples == END).any(1).float().mean() > 0.1 and (samples[:, 0] == END).any()


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_first_puts_the_greedy_caption_of_each_photo_first(name):
    decoder, grid, *_ = make(name)
    with torch.no_grad():
        decoder.output_layer.weight.mul_(5)
    decoder, grid = decoder.float().eval(), Grid(grid.cells.float(), grid.pooling.float())
    samples = sample(decoder, grid, 3, 5, greedy_first=True)
    assert samples.shape[:2] == (3, 4)
    greedy_captions = beam_search(decoder, grid, SearchOptions(1, 5))
    for caption, (greedy,) in zip(samples[:, 0].tolist(), greedy_captions, strict=True):
        words = caption[: caption.index(END)] if END in caption else caption[:5]
        assert words == greedy.words and (END in caption) == greedy.finished


def test_packed_samples_run_from_start_to_end():
    captions = torch.tensor([[5, END, PAD, PAD], [5, 6, 7, 8], [END, PAD, PAD, PAD], [9, 10, END, PAD]])
    words, targets, order = pack_sampled(captions)
    assert order.tolist() == [1, 3, 0, 2] and words.batch_sizes.tolist() == [4, 3, 2, 1]
    assert words.data.tolist() == [START, START, START, START, 5, 9, 5, 6, 10, 7]
    assert targets.tolist() == [5, 9, 5, END, 6, 10, END, 7, END, 8]


@pytest.mark.parametrize("variant", VARIANTS)
def test_scheduled_sampling_with_probability_0_is_teacher_forcing(variant):
    decoder, grid, _, _, packed = make(variant)
    decoder.eval()
    scheduled = scheduled_sampling_forward(decoder, grid, packed, PHOTO, 0.0)
    forced = decoder(grid, packed, PHOTO)
    torch.testing.assert_close(scheduled.logits, forced.logits.log_softmax(1))
    assert (scheduled.attention_sum is None) == (forced.attention_sum is None)
    if forced.attention_sum is not None:
        torch.testing.assert_close(scheduled.attention_sum, forced.attention_sum)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scheduled_sampling_feeds_the_decoder_its_own_samples_with_the_given_probability(variant, monkeypatch):
    decoder, grid, _, _, packed = make(variant)
    inputs, outputs = [], []
    step = decoder.step

    def recording_step(words, state):
        inputs.append(words)
        outputs.append(step(words, state))
        return outputs[-1]

    monkeypatch.setattr(decoder.eval(), "step", recording_step)
    monkeypatch.setattr(sampling, "sample_categorical", lambda probabilities: probabilities.argmax(1))
    scheduled_sampling_forward(decoder, grid, packed, PHOTO, 1.0)
    assert torch.equal(inputs[0], packed.data[: len(inputs[0])]), "the first word is the true one"
    for words, previous in zip(inputs[1:], outputs, strict=False):
        assert torch.equal(words, previous.log_probabilities.argmax(1)[: len(words)])
    replaced = 0
    for _ in range(60):
        inputs.clear()
        scheduled_sampling_forward(decoder, grid, packed, PHOTO, 0.3)
        replaced += int((torch.cat(inputs) != packed.data).sum())
    assert 0.15 < replaced / (60 * (len(packed.data) - 5)) < 0.35, "some samples equal the true word"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_deterministic_decoder_in_training_computes_what_it_computes_in_eval_mode(variant):
    decoder, grid, _, _, packed = make(variant)
    decoder.dropout.p = 0.5
    if isinstance(getattr(decoder, "recurrent", None), nn.RNNBase) and decoder.recurrent.num_layers > 1:
        decoder.recurrent.dropout = 0.5
    expected = decoder.eval()(grid, packed, PHOTO).logits
    decoder.train()
    with deterministic(decoder):
        assert torch.equal(decoder(grid, packed, PHOTO).logits, expected)
    assert all(module.training for module in decoder.modules())
    with deterministic(decoder, keep_dropout=True):
        assert not torch.equal(decoder(grid, packed, PHOTO).logits, expected)
        assert decoder(grid, packed, PHOTO).samples is None, "dropout is the only random part"
        decoder.dropout.p = 0.0
        if hasattr(decoder, "recurrent"):
            decoder.recurrent.dropout = 0.0
        assert torch.equal(decoder(grid, packed, PHOTO).logits, expected), "dropout is the only random part"
    decoder.dropout.p = 0.5
    assert not torch.equal(decoder(grid, packed, PHOTO).logits, expected), "dropout is restored"
    assert banned_ids(torch.device("cpu")).tolist() == [PAD, UNKNOWN, START]


@given(st.integers(0, 10_000), st.floats(0.2, 3), st.floats(0.05, 1))
def test_the_nucleus_is_that_of_the_paper(seed, temperature, top_p):
    log_probabilities = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed)).double().log_softmax(1)
    log_probabilities[0, 3] = -torch.inf
    filtered = nucleus_filter(log_probabilities, temperature, top_p).exp()
    for row, actual in zip(log_probabilities, filtered, strict=True):
        probabilities = row.exp().numpy() ** (1 / temperature)
        probabilities /= probabilities.sum()
        nucleus, mass = np.zeros(9), 0.0
        for word in np.argsort(-probabilities):  # the smallest set of words whose total probability reaches top_p
            if mass < top_p:
                nucleus[word] = probabilities[word]
                mass += probabilities[word]
        np.testing.assert_allclose(actual.numpy(), nucleus / nucleus.sum(), atol=1e-9)


def test_sampled_captions_follow_temperature_and_top_p():
    table = TableDecoder(3, end=-0.3)
    search = SearchOptions(num_captions=20_000, max_length=1, temperature=0.7, top_p=0.8)
    torch.manual_seed(0)
    (captions,) = sample_captions(table, make_grid(0), search)
    row = table.row(0, [START]).index_fill(0, torch.tensor([PAD, UNKNOWN, START]), -torch.inf)
    expected = nucleus_filter(row[None], 0.7, 0.8).exp()[0]
    first_words = torch.tensor([caption.words[0] if caption.words else END for caption in captions])
    frequencies = torch.bincount(first_words, minlength=len(row)) / len(captions)
    torch.testing.assert_close(frequencies, expected, atol=0.012, rtol=0)
    for caption in captions[:50]:
        unfiltered = log_probability(table, 0, caption.words, caption.finished)
        assert caption.log_probability == pytest.approx(unfiltered, abs=1e-5)
        assert caption.finished or len(caption.words) == 1
        assert len(caption.attention) == len(caption.words)


def test_a_temperature_near_zero_samples_the_greedy_caption():
    table = TableDecoder(4, end=-0.5)
    samples = sample_captions(table, make_grid(0, 1), SearchOptions(num_captions=3, max_length=5, temperature=1e-4))
    greedy_captions = beam_search(table, make_grid(0, 1), SearchOptions(1, 5))
    for captions, (greedy,) in zip(samples, greedy_captions, strict=True):
        assert [caption.words for caption in captions] == [greedy.words] * 3


def test_categories_are_sampled_with_their_probability():
    torch.manual_seed(0)
    probabilities = torch.tensor([[0.5, 0.2, 0.0, 0.3], [0.0, 0.0, 1.0, 0.0]])
    samples = sampling.sample_categorical(probabilities.expand(20000, 2, 4))
    assert samples.shape == (20000, 2) and samples.dtype == torch.int64
    for column, expected in zip(samples.T, probabilities, strict=True):
        torch.testing.assert_close(column.bincount(minlength=4) / 20000, expected, rtol=0, atol=0.015)
