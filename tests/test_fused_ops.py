"""What makes the decoders fast changes no value and no gradient."""

import pytest
import torch
from torch import nn

from captioning.decoders import fused_ops
from captioning.decoders.fused_ops import ChunkedAttentionScores, DeferredGradLinear, photo_by_photo, step_by_step
from captioning.runtime.device import autocast

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
    assert torch.equal(unrolled(layer, DeferredGradLinear, first), unrolled(layer, lambda layer: layer, first))
    for ours, plain in zip(
        gradients(layer, DeferredGradLinear, first), gradients(layer, lambda layer: layer, first), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_counts_nothing_twice(layer, first):
    loss = unrolled(layer, DeferredGradLinear, first)
    torch.autograd.grad(loss, [first], retain_graph=True)  # of the weight no gradient is asked
    once = torch.autograd.grad(loss, [layer.weight], retain_graph=True)[0]
    again = torch.autograd.grad(loss, [layer.weight])[0]
    assert torch.equal(once, gradients(layer, DeferredGradLinear, first)[1]) and torch.equal(once, again)


def test_a_layer_that_is_frozen_hands_gradients_on(layer, first):
    layer.requires_grad_(False)
    ours, plain = (
        torch.autograd.grad(unrolled(layer, of, first), [first])[0] for of in (DeferredGradLinear, lambda x: x)
    )
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_in_half_precision_its_gradient_is_nearer_the_truth_than_the_layers_own():
    torch.manual_seed(0)
    layer, first = nn.Linear(64, 64), torch.randn(5, 64, requires_grad=True)
    true = gradients(layer, lambda layer: layer, first)[1]
    with autocast(torch.device("cpu"), torch.bfloat16):
        ours, plain = (gradients(layer, of, first)[1] for of in (DeferredGradLinear, lambda layer: layer))
    assert ours.dtype == torch.float32
    assert (ours - true).norm() < (plain - true).norm()


def test_nothing_is_kept_once_the_gradients_are_there(layer, first):
    kept = []

    def noting(layer):
        kept.append(DeferredGradLinear(layer))
        return kept[0]

    unrolled(layer, noting, first).backward()
    assert not kept[0].notes and layer.weight.grad is not None


def scores_of(activation, inputs, scores_class=ChunkedAttentionScores):
    """Of five captions of three photos, the second without any, fewer and fewer of which go on: (W, P)."""
    keys, weight, *queries = inputs
    scores = scores_class(activation, keys, weight, torch.tensor([2, 0, 2, 2, 0]))
    return torch.cat([scores(query[:, None])[:, 0] for query in queries])


class PlainScores:
    def __init__(self, activation, keys, weight, photo):
        self.activation, self.keys, self.weight = getattr(torch, activation), keys[photo], weight

    def __call__(self, query):
        return (self.activation(self.keys[: len(query), None] + query[:, :, None]) * self.weight).sum(3)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    shapes = (3, 4, 6), (1, 6), *((rows, 6) for rows in ROWS)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("in_cache", [1, 2 * 4 * 6, 10**6], ids=["row by row", "two by two", "a photo at once"])
def test_scores_made_in_parts_have_the_plain_values_and_gradients(activation, in_cache, inputs, monkeypatch):
    monkeypatch.setattr(fused_ops, "IN_CACHE", in_cache // torch.get_num_threads())
    ours, plain = scores_of(activation, inputs), scores_of(activation, inputs, PlainScores)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    factors = torch.randn_like(plain)
    for of_ours, of_plain in zip(
        *(torch.autograd.grad((scores * factors).sum(), inputs) for scores in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(of_ours, of_plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_where_no_cpu_makes_them_scores_are_the_same(activation, inputs, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as for an exported graph, and on a GPU
    whole = scores_of(activation, inputs)
    monkeypatch.undo()
    torch.testing.assert_close(whole, scores_of(activation, inputs), rtol=1e-12, atol=1e-12)


def test_a_photo_may_have_several_rows_side_by_side(inputs):
    keys, weight = inputs[:2]
    query = torch.randn(3, 2, 6, dtype=torch.float64)
    with torch.no_grad():
        ours = ChunkedAttentionScores("relu", keys, weight)(query)
    torch.testing.assert_close(ours, PlainScores("relu", keys, weight, torch.arange(3))(query), rtol=1e-12, atol=1e-12)


def test_gradients_of_scores_asked_for_twice_or_in_part_are_those_of_once(inputs):
    keys, weight, *queries = inputs
    once = torch.autograd.grad(scores_of("relu", inputs).sum(), inputs)
    loss = scores_of("relu", inputs).sum()
    alone = torch.autograd.grad(loss, queries, retain_graph=True)  # of keys and weight none is asked
    for gradients in ((None, None, *alone), *(torch.autograd.grad(loss, inputs, retain_graph=True) for _ in "ab")):
        assert all(ours is None or torch.equal(ours, plain) for ours, plain in zip(gradients, once, strict=True))


def test_half_precision_scores_are_made_in_float32(inputs):
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    with autocast(torch.device("cpu"), torch.bfloat16):
        ours = scores_of("tanh", inputs)
    plain = scores_of("tanh", [tensor.float() for tensor in inputs], PlainScores)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert [gradient.dtype for gradient in torch.autograd.grad(ours.sum(), inputs)] == [torch.bfloat16] * len(inputs)


def test_photo_by_photo_and_step_by_step_see_the_same():
    """Three photos, the second without a caption, for five captions of which fewer and fewer go on."""
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    words = torch.randn(sum(ROWS), 4, dtype=torch.float64, requires_grad=True)
    photo, alone = torch.tensor([2, 0, 2, 2, 0]), []

    def look(values, words):
        alone.append(len(values))
        return (values[:, None] * words.view(len(values), -1, 4).exp()).flatten(0, 1)

    results = [way(look, (values,), (words,), photo, list(ROWS)) for way in (photo_by_photo, step_by_step)]
    assert alone == [1, 1, *ROWS]
    assert torch.equal(results[0], torch.cat([values[photo[:rows]] for rows in ROWS]) * words.exp())
    factors = torch.randn_like(results[0])
    for one, other in zip(
        *(torch.autograd.grad((seen * factors).sum(), [values, words]) for seen in results), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(results[0], results[1])
