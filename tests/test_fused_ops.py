"""The faster operations of the decoders change no value and no gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captioning.decoders import fused_ops
from captioning.decoders.fused_ops import (
    ChunkedAttentionScores,
    DeferredGradLinear,
    DeferredGradProduct,
    OutputLayer,
    photo_by_photo,
    step_by_step,
)
from captioning.runtime.device import autocast

STEP_SIZES = (5, 5, 3, 1)  # rows of each step: captions end
PHOTO_INDEX = torch.tensor([2, 0, 2, 2, 0])  # five captions of three photos; the second has none


def plain(layer):
    """The counterpart of DeferredGradLinear: the layer itself."""
    return layer


def unrolled_loss(layer, wrap, initial):
    """h_t+1 = tanh(layer(h_t)) with fewer and fewer rows -> a scalar that depends on every step."""
    apply, hidden, loss = wrap(layer), initial, 0.0
    for rows in STEP_SIZES:
        hidden = apply(hidden[:rows]).tanh().to(initial.dtype)
        loss = loss + (hidden * torch.arange(1, hidden.numel() + 1).view_as(hidden)).sum()
    return loss


def gradients(layer, wrap, initial):
    return torch.autograd.grad(unrolled_loss(layer, wrap, initial), [initial, *layer.parameters()])


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def layer(request):
    torch.manual_seed(0)
    return nn.Linear(4, 4, bias=request.param, dtype=torch.float64)


@pytest.fixture
def initial():
    return torch.randn(5, 4, dtype=torch.float64, requires_grad=True)


def test_values_and_gradients_equal_those_of_the_layer_itself(layer, initial):
    assert torch.equal(unrolled_loss(layer, DeferredGradLinear, initial), unrolled_loss(layer, plain, initial))
    deferred = gradients(layer, DeferredGradLinear, initial)
    for gradient, expected in zip(deferred, gradients(layer, plain, initial), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_adds_nothing_twice(layer, initial):
    loss = unrolled_loss(layer, DeferredGradLinear, initial)
    torch.autograd.grad(loss, [initial], retain_graph=True)  # no gradient of the weight
    first = torch.autograd.grad(loss, [layer.weight], retain_graph=True)[0]
    second = torch.autograd.grad(loss, [layer.weight])[0]
    assert torch.equal(first, gradients(layer, DeferredGradLinear, initial)[1]) and torch.equal(first, second)


def test_a_frozen_layer_passes_gradients_to_its_inputs(layer, initial):
    layer.requires_grad_(False)
    deferred, expected = (
        torch.autograd.grad(unrolled_loss(layer, wrap, initial), [initial])[0] for wrap in (DeferredGradLinear, plain)
    )
    torch.testing.assert_close(deferred, expected, rtol=1e-12, atol=1e-12)


def test_in_half_precision_the_deferred_gradient_is_more_exact_than_the_layers_own():
    torch.manual_seed(0)
    layer, initial = nn.Linear(64, 64), torch.randn(5, 64, requires_grad=True)
    exact = gradients(layer, plain, initial)[1]
    with autocast(torch.device("cpu"), torch.bfloat16):
        deferred, own = (gradients(layer, wrap, initial)[1] for wrap in (DeferredGradLinear, plain))
    assert deferred.dtype == torch.float32
    assert (deferred - exact).norm() < (own - exact).norm()


def test_the_backward_pass_releases_what_the_steps_saved(layer, initial):
    linear = DeferredGradLinear(layer)
    unrolled_loss(layer, lambda layer: linear, initial).backward()
    assert not linear.deferred.saved and layer.weight.grad is not None


def attention_scores(activation, inputs, scores_class=ChunkedAttentionScores):
    """The scores of the captions of PHOTO_INDEX at each step, with fewer and fewer rows: (W, P)."""
    keys, weight, *queries = inputs
    scores = scores_class(activation, keys, weight, PHOTO_INDEX)
    return torch.cat([scores(query[:, None])[:, 0] for query in queries])


class PlainScores:
    def __init__(self, activation, keys, weight, photo_index):
        self.activation, self.keys, self.weight = getattr(torch, activation), keys[photo_index], weight

    def __call__(self, query):
        return (self.activation(self.keys[: len(query), None] + query[:, :, None]) * self.weight).sum(3)


@pytest.fixture
def inputs():
    """keys (B, P, A), weight (1, A) and the queries (R, A) of each step."""
    torch.manual_seed(0)
    shapes = (3, 4, 6), (1, 6), *((rows, 6) for rows in STEP_SIZES)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("elements", [1, 2 * 4 * 6, 10**6], ids=["one row", "two rows", "all rows of a photo"])
def test_scores_in_chunks_have_the_plain_values_and_gradients(activation, elements, inputs, monkeypatch):
    monkeypatch.setattr(fused_ops, "CACHE_ELEMENTS", elements // torch.get_num_threads())
    chunked, expected = attention_scores(activation, inputs), attention_scores(activation, inputs, PlainScores)
    torch.testing.assert_close(chunked, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    found, reference = (torch.autograd.grad((scores * upstream).sum(), inputs) for scores in (chunked, expected))
    for gradient, expected_gradient in zip(found, reference, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_scores_at_once_equal_scores_in_chunks(activation, inputs, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as in an exported graph, or on a GPU
    at_once = attention_scores(activation, inputs)
    monkeypatch.undo()
    torch.testing.assert_close(at_once, attention_scores(activation, inputs), rtol=1e-12, atol=1e-12)


def test_a_photo_may_have_several_adjacent_rows(inputs):
    keys, weight = inputs[:2]
    query = torch.randn(3, 2, 6, dtype=torch.float64)
    with torch.no_grad():
        scores = ChunkedAttentionScores("relu", keys, weight)(query)
    expected = PlainScores("relu", keys, weight, torch.arange(3))(query)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_scores_requested_twice_or_in_part_equal_those_requested_once(inputs):
    keys, weight, *queries = inputs
    expected = torch.autograd.grad(attention_scores("relu", inputs).sum(), inputs)
    loss = attention_scores("relu", inputs).sum()
    of_queries = torch.autograd.grad(loss, queries, retain_graph=True)  # no gradients of keys and weight
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    for found, reference in ((of_queries, expected[2:]), (first, expected), (second, expected)):
        assert len(found) == len(reference) and all(map(torch.equal, found, reference))


def test_half_precision_scores_are_computed_in_float32(inputs):
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    with autocast(torch.device("cpu"), torch.bfloat16):
        scores = attention_scores("tanh", inputs)
    expected = attention_scores("tanh", [tensor.float() for tensor in inputs], PlainScores)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(scores.sum(), inputs)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * len(inputs)


def test_photo_by_photo_and_step_by_step_give_the_same_context():
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)  # one row per photo
    words = torch.randn(sum(STEP_SIZES), 4, dtype=torch.float64, requires_grad=True)
    photos_per_call = []

    def attend(values, words):
        photos_per_call.append(len(values))
        return (values[:, None] * words.view(len(values), -1, 4).exp()).flatten(0, 1)

    by_photo, by_step = (
        strategy(attend, (values,), (words,), PHOTO_INDEX, list(STEP_SIZES))
        for strategy in (photo_by_photo, step_by_step)
    )
    assert photos_per_call == [1, 1, *STEP_SIZES]
    assert torch.equal(by_photo, torch.cat([values[PHOTO_INDEX[:rows]] for rows in STEP_SIZES]) * words.exp())
    assert torch.equal(by_photo, by_step)
    upstream = torch.randn_like(by_photo)
    found, expected = (
        torch.autograd.grad((context * upstream).sum(), [values, words]) for context in (by_photo, by_step)
    )
    for gradient, expected_gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7])
def test_the_output_layer_computes_in_pieces_what_a_linear_layer_does_at_once(rows):
    layer = OutputLayer(5, 2 * OutputLayer.WORDS + 3).double()
    hidden = torch.randn(rows, 5, dtype=torch.float64)
    pieces = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "addmm", lambda *args, out, addmm=torch.addmm: pieces.append(addmm(*args, out=out)))
        found = layer(hidden)
    torch.testing.assert_close(found, F.linear(hidden, layer.weight, layer.bias), rtol=1e-12, atol=1e-12)
    assert [piece.shape[1] for piece in pieces] == [1024, 1024, 3]
    assert layer(hidden).requires_grad, "with gradients it is a linear layer"


def test_gradients_of_products_with_each_captions_own_matrices_equal_those_of_every_step():
    """Captions end: the later steps have fewer rows."""
    gradients = []
    for make in (DeferredGradProduct, lambda matrices: lambda x: x @ matrices[: len(x)]):
        torch.manual_seed(0)
        matrices = torch.randn(4, 2, 3, 5, dtype=torch.float64, requires_grad=True)
        inputs = [torch.randn(rows, 2, 1, 3, dtype=torch.float64, requires_grad=True) for rows in (4, 3, 3, 1)]
        product = make(matrices)
        sum(product(rows).square().sum() for rows in inputs).backward()
        gradients.append([matrices.grad, *(rows.grad for rows in inputs)])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
