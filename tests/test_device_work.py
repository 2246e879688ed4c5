"""What is captured as a CUDA graph is work of the device alone: it neither waits for the GPU nor copies from the host.

It runs on the meta device, which has shapes but no numbers: the code takes the paths of a GPU, and reading a number
back to the host is an error. The words' batch_sizes stay on the host, as on a GPU.
"""

import contextlib
import gc
from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captioning.dataset.batches import Batch
from captioning.decoders import DECODERS
from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import Grid
from captioning.search.beam_search import _BeamSearch
from captioning.search.graphs import _StaticLoop
from captioning.search.options import SearchOptions
from captioning.search.sampling import _Sampler, deterministic, nucleus_filter
from captioning.training.objectives import Cider, CrossEntropy, LossWeights
from config import Train
from tests.test_cuda_graphs import CAPTURABLE, random_batch
from tests.test_decoders import OWN_SIZES, SIZES

META = torch.device("meta")
# These read the lengths of the captions on the host, not on the device.
READ_LENGTHS = {"_pack_padded_sequence", "_pack_padded_sequence_backward", "_pad_packed_sequence"}
# On a GPU, these read a number back to the host, or copy one there.
WAIT = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "multinomial", "equal", "lift_fresh", "_unique2"}


class NoNumbersOfTheHost(TorchFunctionMode):
    """Raises AssertionError where numbers of the host become a tensor on the device.

    Before torch 2.15 a dispatch mode does not see it.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert function is not torch.tensor or not result.is_meta, f"torch.tensor({args[0]}) is copied to the device"
        return result


class NoWaits(TorchDispatchMode):
    """Raises AssertionError at an operation that waits for the device or computes with tensors of the host, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        name = function.overloadpacket.__name__
        if "meta" in devices:
            assert name not in WAIT, f"{function} waits for the device"
            assert devices == {"meta"} or name in READ_LENGTHS, f"{function} uses tensors on {devices}"
            masks = [tensor for tensor in tree_leaves(args[1:2]) if isinstance(tensor, torch.Tensor)]
            is_masked = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in masks)
            assert not is_masked, f"{function}: the number of rows in a mask is read back"
            assert function is not torch.ops.aten.repeat_interleave.Tensor, f"{function}: the length is read back"
        return result


@contextlib.contextmanager
def device_alone():
    """Context manager: inside it, a wait for the device or a copy between it and the host raises AssertionError."""
    with NoNumbersOfTheHost(), NoWaits():
        yield


@pytest.fixture(autouse=True)
def autocast_knows_meta(monkeypatch):
    """torch.is_autocast_enabled raises for the meta device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)


def meta_batch():
    batch = random_batch([6, 5, 3, 3], 2)
    batch = batch.to(torch.device("cpu"), torch.float32)
    return Batch(
        Grid(batch.photos.cells.to(META), batch.photos.pooling.to(META)),
        PackedSequence(batch.words.data.to(META), batch.words.batch_sizes),
        batch.targets.to(META),
        batch.photo_index.to(META),
        batch.indices,
        rewards=torch.zeros(4, device=META),
        advantages=torch.zeros(4, device=META),
    )


def small_decoder(name):
    return build_decoder(name, {**SIZES, **OWN_SIZES.get(name, {})})


def check_twice(work):
    """Run the work as before a capture, which makes the tensors that are kept, and then as in a capture."""
    work()
    with device_alone():
        work()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor + torch.ones(3).to(META),
        lambda tensor: torch.tensor([1, 2], device=META),
        lambda tensor: tensor.multinomial(1),
        lambda tensor: tensor.index_put((tensor > 0,), torch.ones(3, device=META)),
        lambda tensor: tensor.repeat_interleave(tensor.long()),
    ],
)
def test_work_that_waits_for_the_device_is_found(wrong):
    tensor = torch.ones(3, device=META)
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), device_alone():
        wrong(tensor)


BOTH = {"label_smoothing": 0.1, "feature_dropout": 0.1}


@pytest.mark.parametrize("name, settings", [*((name, BOTH) for name in CAPTURABLE), ("attention", {})], ids=str)
def test_training_on_captions_is_work_of_the_device_alone(name, settings):
    options = Train("data", "run", **settings)
    decoder = small_decoder(name).train().to(META)
    objective = CrossEntropy(options).to(META)
    batch = meta_batch()

    def work():
        grid = batch.photos.dropout_channels(options.feature_dropout)
        objective(decoder, grid, batch, LossWeights()).objective.backward()

    check_twice(work)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_training_on_rewarded_captions_is_work_of_the_device_alone(name):
    decoder = small_decoder(name).train().to(META)
    objective = Cider(Train("data", "run", objective="cider", start_from="other"), reward=None)
    batch = meta_batch()
    check_twice(lambda: objective(decoder, batch.photos, batch, LossWeights()).objective.backward())


def accumulator(parameter):
    """The node that adds to the parameter's gradient: the present one if an autograd graph holds it, else a new one."""
    return parameter.view_as(parameter).grad_fn.next_functions[0][0]


@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
@pytest.mark.parametrize("name", CAPTURABLE)
def test_a_batch_leaves_no_gradient_accumulator_behind(name, kept):
    """It would keep the stream of that batch, and so not be captured on another stream."""
    decoder = small_decoder(name).train()
    batch = random_batch([6, 5, 3, 3], 2).to(torch.device("cpu"), torch.float32)
    loss = CrossEntropy(Train("data", "run"))(decoder, batch.photos, batch, LossWeights())
    for parameter in decoder.parameters():
        accumulator(parameter).metadata["of the batch"] = True
    loss.objective.backward()
    loss = loss if kept else loss._replace(objective=loss.objective.detach())
    gc.collect()  # as GraphCapture does
    assert any(accumulator(parameter).metadata for parameter in decoder.parameters()) == kept


def check_steps(decoding, carry, photos):
    """Check the steps from 1 on as `DecodingGraphs` runs them."""
    loop = _StaticLoop(carry, photos, photos, decoding.num_steps)
    loop.fill(carry, 1)
    check_twice(lambda: loop.run(decoding, range(1, 4)))


def meta_grid():
    rng = torch.randn(3, 64, SIZES["channels"])
    return Grid(rng.to(META), torch.zeros(196, 64, device=META))


GROUPS = SearchOptions(4, 8, num_captions=4, beam_groups=2)
SEARCHES = (  # of one decoder: what a search does with a decoder's steps does not depend on the decoder
    SearchOptions(1, 11),
    SearchOptions(3, 11, length_penalty=0.7, num_captions=2),
    SearchOptions(3, 9, min_length=6),
    SearchOptions(3, 11, no_repeat_ngram=2),
)


@pytest.mark.parametrize("name, search", [*product(DECODERS, [GROUPS]), *product(["attention"], SEARCHES)])
@torch.no_grad()
def test_the_steps_of_a_beam_search_are_work_of_the_device_alone(name, search):
    decoder = small_decoder(name).eval().to(META)
    searcher = _BeamSearch(decoder, search, META)
    beams, _ = searcher.step(searcher.start(meta_grid()), 0)
    check_steps(searcher, beams, 3)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_the_steps_of_sampling_are_work_of_the_device_alone(name):
    decoder = small_decoder(name).train().to(META)

    def choose(log_probabilities):
        return nucleus_filter(log_probabilities, 0.5, 0.9).argmax(1)

    sampler = _Sampler(decoder, 2, 8, choose, key=None)
    with deterministic(decoder):
        carry, _ = sampler.step(sampler.start(meta_grid()), 0)
        check_steps(sampler, carry, 3)
