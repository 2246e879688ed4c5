"""The training objectives, against torch's losses and against exact gradients by enumeration."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import captioning.training.objectives as module
from captioning.dataset.batches import Batch
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.decoders import DECODERS, hard_attention
from captioning.decoders.factory import build_decoder
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.encoders.grid import Grid
from captioning.search.graphs import DecodingGraphs
from captioning.training.cider_reward import CiderReward
from captioning.training.loss_module import LossModule
from captioning.training.objectives import Cider, CrossEntropy, LossWeights
from captioning.training.optimizer import learning_rate_factor, parameter_groups
from config import Train
from preprocess.captions import Photo
from preprocess.vocabulary import END, PAD, SPECIAL, START, Vocabulary
from tests.test_decoders import LENGTHS, OWN_SIZES, PHOTO, make


def make_options(**changes):
    return Train("data/x", "run", **changes).for_device("cpu")


def make_batch(packed, photo_index=PHOTO, vocabulary_size=11):
    torch.manual_seed(3)
    targets = torch.randint(1, vocabulary_size, (len(packed.data),))  # from 1: <pad> is no target
    return SimpleNamespace(words=packed, targets=targets, photo_index=photo_index)


def pop_gradients(module):
    """The gradients of the parameters, which are then reset."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return gradients


# ---- cross entropy


@pytest.mark.parametrize("alpha_c, label_smoothing", [(0.0, 0.0), (1.0, 0.0), (0.5, 0.1)])
def test_the_objective_is_cross_entropy_plus_the_doubly_stochastic_term(alpha_c, label_smoothing):
    decoder, grid, _, _, packed = make("attention")
    batch = make_batch(packed)
    logits, attention_sum, _ = decoder(grid, packed, PHOTO)
    objective = CrossEntropy(make_options(alpha_c=alpha_c, label_smoothing=label_smoothing))
    loss = objective(decoder, grid, batch, LossWeights())
    smoothed = F.cross_entropy(logits, batch.targets, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss.objective, smoothed + alpha_c * ((1 - attention_sum) ** 2).mean())
    plain = F.cross_entropy(logits, batch.targets)
    torch.testing.assert_close(loss.value, plain, msg="the log has the loss without smoothing and penalty")
    assert objective.count(batch) == sum(LENGTHS)


def test_scheduled_sampling_rises_from_zero_to_its_maximum(monkeypatch):
    decoder, grid, _, _, packed = make("attention")
    probabilities = []

    def record(decoder, grid, words, photo_index, sampling_prob):
        probabilities.append(sampling_prob)
        return decoder(grid, words, photo_index)

    monkeypatch.setattr(module, "scheduled_sampling_forward", record)
    objective = CrossEntropy(make_options(scheduled_sampling=0.25, scheduled_sampling_step=0.1))
    for objective.epoch in range(5):
        objective(decoder, grid, make_batch(packed), LossWeights())
    assert probabilities == pytest.approx([0.1, 0.2, 0.25, 0.25])


@pytest.mark.parametrize("name", DECODERS)
def test_scheduled_sampling_gives_every_parameter_of_every_decoder_a_gradient(name):
    decoder, grid, _, _, packed = make(name)
    objective = CrossEntropy(make_options(scheduled_sampling=0.5, scheduled_sampling_step=0.5))
    objective.epoch = 1
    objective(decoder.train(), grid, make_batch(packed), LossWeights()).objective.backward()
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in pop_gradients(decoder))


# ---- REINFORCE


def hard_attention_over_three_cells():
    """A hard attention decoder, a grid of three cells without pooling, and a batch of one caption of three words."""
    torch.manual_seed(5)
    arguments = dict(vocabulary_size=7, channels=3, embedding_size=2, attention_size=3, hidden_size=3, dropout=0.0)
    decoder = build_decoder("hard-attention", arguments).double().train()
    decoder.expectation_fraction = 0.0
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2)
    grid = Grid(2 * torch.randn(1, 3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    packed = pack_padded_sequence(torch.tensor([[START, 5, 4]]), torch.tensor([3]), batch_first=True)
    return decoder, grid, make_batch(packed, torch.tensor([0]), 7)


@pytest.mark.parametrize("baseline", [0.0, -1.7])
def test_the_expected_gradient_of_hard_attention_equals_the_exact_sum_over_all_paths(monkeypatch, baseline):
    """L = sum_s p(s) log p(y | s) over all 27 paths of three cells in three steps (Xu et al. 2015, eq. 10)."""
    decoder, grid, batch = hard_attention_over_three_cells()
    path = []
    monkeypatch.setattr(hard_attention, "sample_categorical", lambda attention: torch.tensor([[next(path)]]))
    objective = CrossEntropy(make_options(entropy_weight=0.0)).double()
    expected = [torch.zeros_like(p) for p in decoder.parameters()]
    exact = 0
    probabilities = []
    for cells in itertools.product(range(3), repeat=3):
        path = iter(cells)
        logits, _, samples = decoder(grid, batch.words, batch.photo_index)
        probability = samples.log_probability.sum().exp()
        exact = exact + probability * F.cross_entropy(logits, batch.targets)
        probabilities.append(float(probability.detach()))
        path = iter(cells)
        objective.reinforce.baseline.fill_(baseline)
        objective(decoder, grid, batch, LossWeights()).objective.backward()
        for total, gradient in zip(expected, pop_gradients(decoder), strict=True):
            total += probabilities[-1] * gradient
    assert sum(probabilities) == pytest.approx(1) and max(probabilities) < 0.5
    exact.backward()
    for (name, _), gradient, true in zip(decoder.named_parameters(), expected, pop_gradients(decoder), strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-8, atol=1e-10, msg=name)
        assert true.abs().max() > 1e-6, name


def test_the_baseline_is_a_moving_average_and_the_entropy_has_its_weight():
    decoder, grid, batch = hard_attention_over_three_cells()
    torch.manual_seed(0)
    logits, _, samples = decoder(grid, batch.words, batch.photo_index)
    plain = CrossEntropy(make_options(reinforce_weight=0.0, entropy_weight=0.0))
    weighted = CrossEntropy(make_options(reinforce_weight=0.0, entropy_weight=0.5))
    losses = []
    for objective in (plain, weighted):
        torch.manual_seed(0)
        losses.append(objective(decoder, grid, batch, LossWeights()).objective)
    torch.testing.assert_close(losses[0] - losses[1], 0.5 * samples.entropy.mean())
    mean = -float(F.cross_entropy(logits, batch.targets).detach())
    assert float(plain.reinforce.baseline) == pytest.approx(0.1 * mean)
    torch.manual_seed(0)
    plain(decoder, grid, batch, LossWeights())
    assert float(plain.reinforce.baseline) == pytest.approx(0.19 * mean)
    assert list(plain.state_dict()) == ["reinforce.baseline"], "a resumed run continues it"


def test_a_decoder_that_attends_to_the_expectation_has_no_reinforce_term(monkeypatch):
    decoder, grid, batch = hard_attention_over_three_cells()
    monkeypatch.setattr(HardAttentionDecoder, "expectation_fraction", 1.0)
    del decoder.expectation_fraction
    loss = CrossEntropy(make_options(entropy_weight=0.0))(decoder, grid, batch, LossWeights())
    torch.testing.assert_close(loss.objective, loss.value)


# ---- CIDEr


PHOTOS = [Photo("", "", "train", (("a", "b"), ("b", "b"))), Photo("", "", "train", (("a",), ("b", "a", "a")))]
VOCABULARY = Vocabulary("en", "whitespace", 1, (*SPECIAL, "a", "b"))


def all_captions(max_length):
    """Every caption of `a` (4) and `b` (5) that can be sampled: ended, or truncated at max_length; padded."""
    for length in range(max_length + 1):
        for words in itertools.product((4, 5), repeat=length):
            if length < max_length:
                yield torch.tensor([*words, END, *[PAD] * (max_length - length - 1)])
            else:
                yield torch.tensor(words)


def unprepared(grid, indices):
    """A batch of these photos of the dataset, with a caption that is not used."""
    words = pack_sequence([torch.tensor([START])])
    return Batch(grid, words, torch.tensor([END]), torch.tensor([0]), np.array(indices))


def caption_log_probabilities(decoder, grid, captions):
    """(N,) log p of each of these captions, of words 3 (<end>), 4 and 5."""
    with module.deterministic(decoder):
        words, targets, order = module.pack_sampled(torch.stack(captions))
        logits = decoder(grid, words, torch.zeros_like(order)).logits[:, 3:]
    log_p = (-F.cross_entropy(logits, targets - 3, reduction="none")).split(words.batch_sizes.tolist())
    return torch.stack([F.pad(step, (0, len(captions) - len(step))) for step in log_p]).sum(0)[order.argsort()]


@pytest.mark.parametrize("name", ["lstm", "adaptive", "hard-attention"])
@pytest.mark.parametrize("baseline, samples", [("leave-one-out", 2), ("greedy", 1)])
def test_the_expected_gradient_of_cider_equals_the_exact_sum_over_all_captions(monkeypatch, name, baseline, samples):
    """The gradient of -sum_y p(y) r(y), with a vocabulary of two words and captions of at most three."""
    torch.manual_seed(6)
    arguments = dict(vocabulary_size=6, channels=3, embedding_size=2, attention_size=3, hidden_size=3, dropout=0.0)
    decoder = build_decoder(name, arguments).double().train()
    grid = Grid(torch.randn(1, 3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    objective = Cider(
        make_options(objective="cider", start_from="run", samples=samples, baseline=baseline),
        CiderReward(CaptionDataset(PHOTOS, VOCABULARY, 9)),
    )
    captions = list(all_captions(3))
    probabilities = caption_log_probabilities(decoder, grid, captions).exp()
    assert float(probabilities.detach().sum()) == pytest.approx(1)
    rewards = torch.from_numpy(objective.reward(np.ones(len(captions), int), torch.stack(captions).numpy()))
    (-probabilities @ rewards).backward()
    exact = pop_gradients(decoder)
    expected = [torch.zeros_like(gradient) for gradient in exact]
    batch = unprepared(grid, [1])
    greedy = [captions[7]] if baseline == "greedy" else []
    for chosen in itertools.product(range(len(captions)), repeat=samples):
        sampled = torch.stack([*greedy, *(captions[i] for i in chosen)])
        monkeypatch.setattr(module, "sample", lambda *_, sampled=sampled: sampled[None])
        loss = objective(decoder, grid, objective.prepare(decoder, grid, batch), LossWeights())
        loss.objective.backward()
        assert float(loss.value) == pytest.approx(100 * float(rewards[list(chosen)].mean()))
        assert objective.count(batch) == samples
        probability = math.prod(float(probabilities.detach()[i]) for i in chosen)
        for total, gradient in zip(expected, pop_gradients(decoder), strict=True):
            total += probability * gradient
    for (parameter, _), gradient, true in zip(decoder.named_parameters(), expected, exact, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-8, atol=1e-10, msg=parameter)
    assert sum(gradient.abs().sum() for gradient in exact) > 0.01


def test_cider_gradients_of_two_batches_add_up_to_those_of_one(monkeypatch):
    decoder, grid, *_ = make("attention")
    captions = torch.tensor([[[4, 5, END], [5, END, 0]], [[4, END, 0], [5, 5, 4]], [[5, 4, END], [4, 4, END]]])
    reward = CiderReward(CaptionDataset(PHOTOS * 2, VOCABULARY, 9))
    objective = Cider(make_options(objective="cider", start_from="run", samples=2), reward)
    gradients = []
    for batches in ([[0, 1, 2]], [[0], [1, 2]]):
        for photos in batches:
            monkeypatch.setattr(module, "sample", lambda *_, photos=photos: captions[photos])
            part = grid.select(torch.tensor(photos))
            batch = objective.prepare(decoder, part, unprepared(part, photos))
            weights = LossWeights(photos=len(photos) / 3)
            objective(decoder, part, batch, weights).objective.backward()
        gradients.append(pop_gradients(decoder))
    for one_batch, two_batches in zip(*gradients, strict=True):
        torch.testing.assert_close(one_batch, two_batches)


def test_cider_samples_are_as_long_as_max_length_allows(monkeypatch):
    decoder, grid, *_ = make("attention")
    torch.nn.init.constant_(decoder.output_layer.bias[END], -100.0)  # captions never end by themselves
    sampled, sample = [], module.sample

    def record(*arguments):
        sampled.append(sample(*arguments))
        return sampled[-1]

    monkeypatch.setattr(module, "sample", record)
    batch = unprepared(grid, [0, 1, 2])
    for max_length in (2, 40):  # 40: more than the default of captioning
        options = make_options(objective="cider", start_from="run", samples=2, max_length=max_length)
        objective = Cider(options, CiderReward(CaptionDataset(PHOTOS * 2, VOCABULARY, max_length)))
        objective.prepare(decoder.train(), grid, batch)
        assert sampled[-1].shape == (3, 2, max_length + 1), "max_length words, then <end> or the word in its place"


def make_cider(name, **settings):
    """A loss module with dropout of features and hidden states, and a batch of four photos."""
    torch.manual_seed(0)
    sizes = dict(vocabulary_size=11, channels=6, embedding_size=5, attention_size=4, hidden_size=7, dropout=0.4)
    reward = CiderReward(CaptionDataset(PHOTOS * 2, VOCABULARY, 9))
    options = make_options(objective="cider", start_from="run", samples=3, max_length=5, **settings)
    decoder = build_decoder(name, {**sizes, **OWN_SIZES.get(name, {})}).train()
    loss_module = LossModule(None, decoder, Cider(options, reward), feature_dropout=0.3)
    grid = Grid(torch.randn(4, 64, 6), torch.full((196, 64), 1 / 64))
    return loss_module, unprepared(grid, [0, 1, 2, 3])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("baseline", ["leave-one-out", "greedy"])
def test_a_prepared_batch_has_the_loss_and_gradients_of_one_call_bit_for_bit(name, baseline):
    loss_module, batch = make_cider(name, baseline=baseline)
    results = []
    for prepare in (lambda batch: batch, loss_module.prepare):
        torch.manual_seed(1)
        prepared = prepare(batch)
        assert prepared.is_prepared == (prepared is not batch)
        loss = loss_module(prepared, LossWeights(photos=0.25))
        loss.objective.backward()
        results.append([loss.objective.detach(), loss.value, *pop_gradients(loss_module)])
        assert loss_module.objective.count(prepared) == 12 and float(loss.value) > 0
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("baseline", ["leave-one-out", "greedy"])
def test_captions_sampled_in_cuda_graphs_are_those_sampled_without(baseline):
    loss_module, batch = make_cider("attention", baseline=baseline)
    graphs = DecodingGraphs(lambda work: work)
    for seed in range(3):
        prepared = []
        for loss_module.objective.graphs in (None, graphs):
            torch.manual_seed(seed)
            prepared.append(loss_module.prepare(batch))
        for plain, graphed in [
            [part.words.data for part in prepared],
            *([getattr(part, name) for part in prepared] for name in ("targets", "rewards", "advantages")),
        ]:
            assert torch.equal(plain, graphed)
    assert len(graphs.loops) == 1


def test_nothing_is_prepared_for_cross_entropy_or_with_a_live_encoder():
    loss_module, batch = make_cider("attention")
    live = replace(batch, photos=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    assert loss_module.prepare(live) is live
    loss_module.objective = CrossEntropy(make_options())
    state = torch.get_rng_state()
    assert loss_module.prepare(batch) is batch and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", DECODERS)
def test_captions_and_words_that_only_pad_do_not_change_the_loss_of_cider(name):
    decoder, grid, *_ = make(name)
    captions = torch.tensor([[[4, 5, END], [5, END, PAD]], [[4, END, PAD], [5, 5, 4]], [[5, 4, END], [4, 4, END]]])
    reward = CiderReward(CaptionDataset(PHOTOS * 2, VOCABULARY, 9))
    objective = Cider(make_options(objective="cider", start_from="run", samples=2), reward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sample", lambda *_: captions)
        batch = objective.prepare(decoder.train(), grid, unprepared(grid, [0, 1, 2]))
    results = []
    for each in (batch, pad_captions(batch, captions=9, steps=5)):
        loss = objective(decoder, grid, each, LossWeights(photos=0.5))
        loss.objective.backward()
        results.append([loss.objective.detach(), loss.value, *pop_gradients(decoder)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert sum(float(gradient.abs().sum()) for gradient in results[0][2:]) > 0.01


def pad_captions(batch, captions, steps):
    """The batch with so many captions, of so many steps each."""

    def pad(packed):
        padded = torch.full((steps, captions), PAD)
        words, _ = pad_packed_sequence(PackedSequence(packed, batch.words.batch_sizes))
        padded[: len(words), : words.shape[1]] = words
        return padded.flatten()

    more = captions - batch.num_captions
    return replace(
        batch,
        words=PackedSequence(pad(batch.words.data), torch.full((steps,), captions)),
        targets=pad(batch.targets),
        photo_index=F.pad(batch.photo_index, (0, more)),
        rewards=F.pad(batch.rewards, (0, more)),
        advantages=F.pad(batch.advantages, (0, more)),
    )


def test_rewards_reach_the_device_in_float32_unless_the_decoder_is_in_float64():
    """MPS does not have float64."""
    decoder, grid, *_ = make("lstm")
    reward = CiderReward(CaptionDataset(PHOTOS * 2, VOCABULARY, 9))
    objective = Cider(make_options(objective="cider", start_from="run", samples=2), reward)
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        cells = Grid(grid.cells.to(dtype), grid.pooling.to(dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model = decoder.double() if dtype == torch.float64 else decoder.float()
            batch = objective.prepare(model, cells, unprepared(cells, [0, 1, 2]))
        assert batch.rewards.dtype == batch.advantages.dtype == expected


def test_weights_learn_from_captions_sampled_in_half_precision():
    """Autocast keeps the weights that it converts; those converted while sampling have no gradients."""
    decoder, grid, *_ = make("attention")
    decoder, grid = decoder.float().train(), Grid(grid.cells.float(), grid.pooling.float())
    reward = CiderReward(CaptionDataset(PHOTOS * 2, VOCABULARY, 9))
    objective = Cider(make_options(objective="cider", start_from="run", samples=3), reward)
    loss_module = LossModule(None, decoder, objective, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_module(unprepared(grid, [0, 1, 2]), LossWeights())
    loss.objective.backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in decoder.parameters())


# ---- the optimizer


def test_the_learning_rate_follows_its_schedule():
    step, cosine = make_options(lr_decay=0.5, lr_decay_every=3), make_options(schedule="cosine", epochs=10)
    assert [learning_rate_factor(step, epoch, epoch + 0.1) for epoch in (0, 2.99, 3, 6)] == [1, 1, 0.5, 0.25]
    assert [learning_rate_factor(cosine, epoch, epoch + 0.1) for epoch in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], 1.0), 40)
    for update in range(40):
        assert learning_rate_factor(cosine, update / 4, (update + 1) / 4) == pytest.approx(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()
    warmup = make_options(warmup_epochs=2.0, lr_decay=0.5, lr_decay_every=3)
    assert [learning_rate_factor(warmup, epoch, epoch + 0.5) for epoch in (0, 1, 1.5, 2, 3)] == [0.25, 0.75, 1, 1, 0.5]


def test_weights_decay_but_biases_and_norms_do_not():
    decoder = make("lstm")[0]
    with_decay, without_decay = parameter_groups({"learning_rate": decoder.parameters()}, 0.1)
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    assert {names[p] for p in with_decay["params"]} == {
        "photo_projection.weight",
        "embedding.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
        "output_layer.weight",
    }
    assert len(with_decay["params"]) + len(without_decay["params"]) == len(names)
    assert with_decay["weight_decay"] == 0.1 and without_decay["weight_decay"] == 0
