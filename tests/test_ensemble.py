"""Several decoders as one."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings

from captioning.decoders import DECODERS
from captioning.decoders.ensemble import Ensemble
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from preprocess.vocabulary import START
from tests.test_beam_search import WORDS, Table, best, grid_of, log_probability, same, seeds
from tests.test_decoders import make


class Member(Table):
    has_sentinel = False


def mean_probability(tables, photo, words):
    """log of the product of every word's mean probability: not the mean of the captions' probabilities."""
    steps = [[log_probability(table, photo, words[:i], False) for i in range(len(words) + 1)] for table in tables]
    steps = [[*step, log_probability(table, photo, words)] for step, table in zip(steps, tables, strict=True)]
    each = [[after - before for before, after in itertools.pairwise(step)] for step in steps]
    return sum(math.log(sum(map(math.exp, word)) / len(tables)) for word in zip(*each, strict=True))


@settings(max_examples=20)
@given(seeds)
def test_an_ensemble_finds_the_caption_whose_words_are_likeliest_in_the_mean(seed):
    tables = [Member(seed + i, end=-1.0) for i in range(3)]
    for photo, found in enumerate(best(Ensemble(tables), grid_of(0, 1), (WORDS + 1) ** 3, 2)):
        captions = [list(c) for n in range(3) for c in itertools.product(range(4, 4 + WORDS), repeat=n)]
        score, words = max((mean_probability(tables, photo, words), words) for words in captions)
        assert found.words == words and found.log_probability == pytest.approx(score, abs=1e-5)


@torch.no_grad()
def test_each_member_goes_on_in_a_state_of_its_own():
    members = [make(name, seed)[0].eval() for seed, name in enumerate(DECODERS)]
    grid = make("lstm")[1]
    together, alone = Ensemble(members), [member.init_state(grid) for member in members]
    state, words = together.init_state(grid), torch.full((len(grid),), START)
    for _ in range(3):
        step = together.step(words, state)
        steps = [member.step(words, own) for member, own in zip(members, alone, strict=True)]
        mean = torch.stack([step.log_probabilities.exp() for step in steps]).mean(0)
        torch.testing.assert_close(step.log_probabilities.exp(), mean)
        looked = [step.attention for step in steps if step.attention is not None]
        torch.testing.assert_close(step.attention, torch.stack(looked).mean(0))
        state, alone, words = step.state, [step.state for step in steps], mean.argmax(1)


def test_an_ensemble_of_equals_is_each_of_them_also_after_photos_have_left_the_batch():
    decoder, grid, *_ = make("attention")
    decoder = decoder.eval()
    search = SearchOptions(beam_size=3, max_length=6, num_captions=2)
    alone, together = (beam_search(who, grid, search) for who in (decoder, Ensemble([decoder] * 3)))
    for one, other in zip(alone, together, strict=True):
        for expected, found in zip(one, other, strict=True):
            same(found, expected)
