"""The moving average of the weights, against its formula and against torch's own."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from captioning.training.ema import EMA


def train(model, updates, after_update):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(updates):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after_update()


def test_the_average_follows_its_formula():
    model = nn.Linear(3, 2)
    ema = EMA(list(model.parameters()), 0.9)
    weights = []

    def after_update():
        weights.append(model.weight.detach().clone())
        ema.update()

    train(model, 120, after_update)
    expected = weights[0]
    for n, weight in enumerate(weights, 1):
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(ema.averages[0], expected)


def test_after_its_warmup_it_equals_torchs_average():
    model = nn.Linear(3, 2)
    ema = EMA(list(model.parameters()), 0.8)
    train(model, 60, ema.update)  # (1 + n) / (10 + n) exceeds 0.8 from n = 35
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    reference.update_parameters(model)
    ema.averages = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, 20, lambda: (ema.update(), reference.update_parameters(model)))
    for average, expected in zip(ema.averages, reference.module.parameters(), strict=True):
        torch.testing.assert_close(average, expected)


def test_the_weights_are_swapped_back_even_after_an_error():
    model = nn.Linear(3, 2)
    ema = EMA(list(model.parameters()), 0.9)
    train(model, 9, ema.update)
    weight, average = model.weight.detach().clone(), ema.averages[0].clone()
    with pytest.raises(KeyError), ema.average_parameters():
        assert torch.equal(model.weight, average) and not torch.equal(average, weight)
        raise KeyError
    assert torch.equal(model.weight, weight) and torch.equal(ema.averages[0], average)


def test_the_averages_are_swapped_in_place_where_a_cuda_graph_reads_them():
    model = nn.Linear(3, 2)
    ema = EMA(list(model.parameters()), 0.9)
    train(model, 9, ema.update)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    averages = [average.clone() for average in ema.averages]
    with ema.average_parameters():
        assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
        assert all(map(torch.equal, model.parameters(), averages))
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_it_starts_from_the_weights_of_the_first_update_not_from_those_at_construction():
    model = nn.Linear(3, 2)
    ema = EMA(list(model.parameters()), 0.9)
    nn.init.constant_(model.weight, 5.0)
    ema.update()
    assert torch.equal(ema.averages[0], model.weight)
