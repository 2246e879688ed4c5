"""The moving average of the weights, against its formula and torch's own."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from captioning.training.ema import EMA


def train(model, updates, after):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(updates):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


def test_the_average_follows_its_formula():
    model = nn.Linear(3, 2)
    average, seen = EMA(list(model.parameters()), 0.9), []

    def after():
        seen.append(model.weight.detach().clone())
        average.update()

    train(model, 120, after)
    expected = seen[0]
    for n, weight in enumerate(seen, 1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.averages[0], expected)


def test_after_its_warm_up_it_is_torchs_own_average():
    model = nn.Linear(3, 2)
    average = EMA(list(model.parameters()), 0.8)
    train(model, 60, average.update)  # (1 + n) / (10 + n) passes 0.8 at n = 35
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    theirs.update_parameters(model)
    average.averages = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, 20, lambda: (average.update(), theirs.update_parameters(model)))
    for ours, other in zip(average.averages, theirs.module.parameters(), strict=True):
        torch.testing.assert_close(ours, other)


def test_the_weights_are_themselves_again_after_a_look_even_after_an_error():
    model = nn.Linear(3, 2)
    average = EMA(list(model.parameters()), 0.9)
    train(model, 9, average.update)
    weight, averaged = model.weight.detach().clone(), average.averages[0].clone()
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(model.weight, averaged) and not torch.equal(averaged, weight)
        raise KeyError
    assert torch.equal(model.weight, weight) and torch.equal(average.averages[0], averaged)


def test_it_starts_from_the_weights_of_the_first_update_not_from_those_it_was_made_with():
    model = nn.Linear(3, 2)
    average = EMA(list(model.parameters()), 0.9)
    nn.init.constant_(model.weight, 5.0)
    average.update()
    assert torch.equal(average.averages[0], model.weight)
