"""Ensembles: several decoders that write one caption together."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from captioning.decoders import DECODERS
from captioning.decoders.ensemble import Ensemble, PhotoViews, ViewEnsemble
from captioning.search.beam_search import beam_search
from captioning.search.graphs import DecodingGraphs
from captioning.search.options import SearchOptions
from preprocess.vocabulary import START
from tests.test_beam_search import (
    WORDS,
    TableDecoder,
    assert_same_caption,
    best_captions,
    log_probability,
    make_grid,
    seeds,
)
from tests.test_decoders import make


class Member(TableDecoder):
    has_sentinel = False


def mean_probability(tables, photo, words):
    """Log of the product of the words' mean probabilities, which is not the mean of the captions' probabilities."""
    word_log_probabilities = []  # per table, of each word and <end>
    for table in tables:
        cumulative = [log_probability(table, photo, words[:i], finished=False) for i in range(len(words) + 1)]
        cumulative.append(log_probability(table, photo, words))
        word_log_probabilities.append([after - before for before, after in itertools.pairwise(cumulative)])
    means = [sum(map(math.exp, members)) / len(tables) for members in zip(*word_log_probabilities, strict=True)]
    return sum(map(math.log, means))


@settings(max_examples=20)
@given(seeds)
def test_an_ensemble_finds_the_caption_with_the_highest_mean_probabilities(seed):
    tables = [Member(seed + i, end=-1.0) for i in range(3)]
    for photo, found in enumerate(best_captions(Ensemble(tables), make_grid(0, 1), (WORDS + 1) ** 3, 2)):
        captions = [list(c) for n in range(3) for c in itertools.product(range(4, 4 + WORDS), repeat=n)]
        score, words = max((mean_probability(tables, photo, words), words) for words in captions)
        assert found.words == words and found.log_probability == pytest.approx(score, abs=1e-5)


@torch.no_grad()
def test_each_member_continues_from_its_own_state():
    members = [make(name, seed)[0].eval() for seed, name in enumerate(DECODERS)]
    grid = make("lstm")[1]
    ensemble = Ensemble(members)
    state = ensemble.init_state(grid)
    member_states = [member.init_state(grid) for member in members]
    words = torch.full((len(grid),), START)
    for _ in range(3):
        ensemble_step = ensemble.step(words, state)
        steps = [member.step(words, member_state) for member, member_state in zip(members, member_states, strict=True)]
        mean = torch.stack([step.log_probabilities.exp() for step in steps]).mean(0)
        torch.testing.assert_close(ensemble_step.log_probabilities.exp(), mean)
        attentions = [step.attention for step in steps if step.attention is not None]
        torch.testing.assert_close(ensemble_step.attention, torch.stack(attentions).mean(0))
        state, member_states = ensemble_step.state, [step.state for step in steps]
        words = mean.argmax(1)


def test_an_ensemble_of_equal_members_equals_one_member_also_after_photos_finish():
    decoder, grid, *_ = make("attention")
    decoder = decoder.eval()
    search = SearchOptions(beam_size=3, max_length=6, num_captions=2)
    expected = beam_search(decoder, grid, search)
    found = beam_search(Ensemble([decoder] * 3), grid, search)
    for photo_expected, photo_found in zip(expected, found, strict=True):
        for expected_caption, found_caption in zip(photo_expected, photo_found, strict=True):
            assert_same_caption(found_caption, expected_caption)


def make_views(grid, number):
    """The grid, and others like it with other cells."""
    others = [replace(grid, cells=torch.randn_like(grid.cells)) for _ in range(number - 1)]
    return PhotoViews([grid, *others])


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_log_probabilities_are_averaged_over_the_views_and_attention_is_that_over_the_whole_photo(name):
    decoder, grid, *_ = make(name)
    views = make_views(grid, 3)
    ensemble = ViewEnsemble(decoder.eval(), 3)
    state, states = ensemble.init_state(views), [decoder.init_state(view) for view in views.grids]
    words = torch.full((len(grid),), START)
    for _ in range(3):
        found = ensemble.step(words, state)
        steps = [decoder.step(words, view_state) for view_state in states]
        mean = torch.stack([step.log_probabilities for step in steps]).mean(0)
        expected = mean - mean.exp().sum(1, keepdim=True).log()
        torch.testing.assert_close(found.log_probabilities, expected)
        assert (found.attention is None) == (steps[0].attention is None)
        if found.attention is not None:
            assert torch.equal(found.attention, steps[0].attention)
        state, states = found.state, [step.state for step in steps]
        words = mean.argmax(1)


@pytest.mark.parametrize("graphs", [None, DecodingGraphs(lambda work: work)])
def test_equal_views_equal_one_view_also_after_photos_finish(graphs):
    decoder, grid, *_ = make("attention")
    search = SearchOptions(beam_size=3, max_length=6, num_captions=2)
    expected = beam_search(decoder.eval(), grid, search)
    ensemble = ViewEnsemble(decoder, 4)
    for _ in range(3):
        found = beam_search(ensemble, PhotoViews([grid] * 4), search, graphs)
        for photo_expected, photo_found in zip(expected, found, strict=True):
            for expected_caption, found_caption in zip(photo_expected, photo_found, strict=True):
                assert_same_caption(found_caption, expected_caption)
