"""What makes the decoders fast changes no value and no gradient."""

import pytest
import torch
from torch import nn

from captioning.decoders import fast
from captioning.decoders.fast import AllSteps, in_parts
from captioning.device import autocast

ROWS = (5, 5, 3, 1)  # of each step: captions end


def unrolled(layer, weight_of, first):
    """h_t+1 = tanh(layer(h_t)) of fewer and fewer rows -> a scalar that every step moves."""
    apply, hidden, total = weight_of(layer), first, 0.0
    for rows in ROWS:
        hidden = apply(hidden[:rows]).tanh().to(first.dtype)
        total = total + (hidden * torch.arange(1, hidden.numel() + 1).view_as(hidden)).sum()
    return total


def gradients(layer, weight_of, first):
    inputs = [first, *layer.parameters()]
    return torch.autograd.grad(unrolled(layer, weight_of, first), inputs)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def layer(request):
    torch.manual_seed(0)
    return nn.Linear(4, 4, bias=request.param, dtype=torch.float64)


@pytest.fixture
def first():
    return torch.randn(5, 4, dtype=torch.float64, requires_grad=True)


def test_values_and_gradients_are_those_of_the_layer_itself(layer, first):
    assert torch.equal(unrolled(layer, AllSteps, first), unrolled(layer, lambda layer: layer, first))
    for ours, plain in zip(
        gradients(layer, AllSteps, first), gradients(layer, lambda layer: layer, first), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_counts_nothing_twice(layer, first):
    loss = unrolled(layer, AllSteps, first)
    torch.autograd.grad(loss, [first], retain_graph=True)  # of the weight no gradient is asked
    once = torch.autograd.grad(loss, [layer.weight], retain_graph=True)[0]
    again = torch.autograd.grad(loss, [layer.weight])[0]
    assert torch.equal(once, gradients(layer, AllSteps, first)[1]) and torch.equal(once, again)


def test_a_layer_that_is_frozen_hands_gradients_on(layer, first):
    layer.requires_grad_(False)
    ours, plain = (torch.autograd.grad(unrolled(layer, of, first), [first])[0] for of in (AllSteps, lambda x: x))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_in_half_precision_its_gradient_is_nearer_the_truth_than_the_layers_own():
    torch.manual_seed(0)
    layer, first = nn.Linear(64, 64), torch.randn(5, 64, requires_grad=True)
    true = gradients(layer, lambda layer: layer, first)[1]
    with autocast(torch.device("cpu"), torch.bfloat16):
        ours, plain = (gradients(layer, of, first)[1] for of in (AllSteps, lambda layer: layer))
    assert ours.dtype == torch.float32
    assert (ours - true).norm() < (plain - true).norm()


def test_nothing_is_kept_once_the_gradients_are_there(layer, first):
    kept = []

    def noting(layer):
        kept.append(AllSteps(layer))
        return kept[0]

    unrolled(layer, noting, first).backward()
    assert not kept[0].notes and layer.weight.grad is not None


@pytest.mark.parametrize("in_cache", [1, 2 * 3 * 4 * 6, 10**6], ids=["one by one", "two by two", "all at once"])
def test_scores_in_parts_are_the_scores(in_cache, monkeypatch):
    monkeypatch.setattr(fast, "IN_CACHE", in_cache)
    keys, query, parts = torch.randn(5, 4, 6), torch.randn(5, 3, 6), []

    def scores(keys, query, out=None):
        parts.append(len(keys))
        return torch.add(keys[:, None], query[:, :, None], out=out).relu_().sum(3)

    whole = in_parts(scores, keys, query)
    assert parts == [5]  # with gradients: every part would have to be kept anyway
    with torch.no_grad():
        assert torch.equal(in_parts(scores, keys, query), whole)
    assert parts[1:] == {1: [1] * 5, 144: [2, 2, 1], 10**6: [5]}[in_cache]
