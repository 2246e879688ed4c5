"""Every decoder goes through every training method and every search. Where each is tested:

| method | test |
|---|---|
| scheduled sampling | test_objectives, test_sampling, here |
| label smoothing | test_cuda_graphs, here |
| CIDEr optimisation | test_objectives; whole runs: test_training_methods |
| ensembles of unlike decoders, views | test_ensemble |
| sampling | test_sampling, test_decoding_graphs |
| beam search; diverse beams | test_beam_search, test_decoding_graphs; here |
| moving average, half precision, word vectors, freezing, positions | here; whole runs: test_training_methods |
| resume to the bit | test_commands |
| several processes | test_distributed |
| ONNX and torch export | test_export |
"""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from captioning.decoders import DECODERS
from captioning.decoders.word_vectors import load_word_vectors
from captioning.encoders.grid import Grid
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from captioning.training.ema import EMA
from captioning.training.objectives import CrossEntropy, LossWeights
from captioning.training.optimizer import make_optimizer, parameter_groups
from config import Train
from preprocess.vocabulary import SPECIAL
from tests.test_decoders import LENGTHS, PHOTO, make
from tests.test_decoding_graphs import make_sharp

WORDS = (*SPECIAL, *"abcdefg")  # as many as the vocabulary of `make`


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DECODERS)
def test_all_training_methods_together_in_half_precision(name, precision, tmp_path):
    """As train.py combines them, but for the loop."""
    if (name, precision) == ("lstm", torch.float16):
        pytest.skip("a CPU has no LSTM in float16")
    (tmp_path / "vectors.txt").write_text("\n".join(f"{word}{' 0.5' * 5}" for word in "abcd"))
    decoder, grid, _, _, packed = make(name if name == "lstm" else f"{name} --positions learnt")
    decoder = decoder.float().train()
    embedding = decoder.embedding.weight
    load_word_vectors(embedding.data, tmp_path / "vectors.txt", SimpleNamespace(words=WORDS))
    embedding.requires_grad_(False)
    parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameter_groups({"learning_rate": decoder.parameters()}, 0.1))
    ema = EMA(parameters, 0.9)
    objective = CrossEntropy(Train("data", "run", label_smoothing=0.1, scheduled_sampling=0.5))
    objective.epoch = 9
    targets = torch.randint(1, len(WORDS), (sum(LENGTHS),))
    batch = SimpleNamespace(words=packed, targets=targets, photo_index=PHOTO)
    frozen, before = embedding.clone(), [parameter.detach().clone() for parameter in parameters]
    for _ in range(2):
        with torch.autocast("cpu", precision):
            half = Grid(grid.cells.to(precision), grid.pooling.float())
            loss = objective(decoder, half, batch, LossWeights()).objective
        (1024 * loss).backward()  # as the loss is scaled in float16
        for parameter in parameters:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
            parameter.grad /= 1024
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    assert torch.equal(embedding, frozen) and embedding[WORDS.index("d")].tolist() == [0.5] * 5
    assert not any(map(torch.equal, parameters, before)), "all others are trained"
    with ema.average_parameters():
        assert not any(map(torch.equal, parameters, ema.averages))


@pytest.mark.parametrize("name", DECODERS)
def test_in_bfloat16_a_step_keeps_the_types_of_the_state_and_its_attention_sums_to_one(name):
    """The static tensors of CUDA graphs need the former."""
    decoder, grid, _, words, _ = make(name)
    decoder, grid = decoder.float().eval(), Grid(grid.cells.float(), grid.pooling.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = decoder.init_state(grid)
        step = decoder.step(words[:3, 0], state)
    types, next_types = ([tensor.dtype for tensor in chain(*each)] for each in (state, step.state))
    assert types == next_types
    if name != "lstm":  # whose library chooses
        assert all(tensor.dtype == torch.float32 for tensor in state.per_caption)
    if decoder.uses_attention and not decoder.has_sentinel:
        torch.testing.assert_close(step.attention.sum(1), torch.ones(3))


@pytest.mark.parametrize("name", DECODERS)
def test_the_first_group_of_a_diverse_search_is_a_search_and_the_second_differs(name):
    decoder, grid = make_sharp(name)
    grid = Grid(grid.cells[:6], grid.pooling)
    alone = beam_search(decoder, grid, SearchOptions(2, 8))
    groups = SearchOptions(4, 8, num_captions=2, beam_groups=2, diversity_penalty=1e6)
    for (expected,), captions in zip(alone, beam_search(decoder, grid, groups), strict=True):
        assert captions[0].words == expected.words
        assert [caption.words[:1] for caption in captions[1:]] != [expected.words[:1]], "another first word"
