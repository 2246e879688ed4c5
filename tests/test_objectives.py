"""What training minimises, against torch's own losses and against exact gradients by enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import captioning.training.objectives as module
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.decoders import DECODERS, hard_attention
from captioning.decoders.factory import build_decoder
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.encoders.grid import Grid
from captioning.training.cider_reward import CiderReward
from captioning.training.objectives import Cider, CrossEntropy, LossWeights
from captioning.training.optimizer import learning_rate_factor, parameter_groups
from config import Train
from preprocess.captions import Photo
from preprocess.vocabulary import END, SPECIAL, START, Vocabulary
from tests.test_decoders import LENGTHS, PHOTO, make


def settings(**changes):
    return Train("data/x", "run", **changes)


def batch_of(packed, photo=PHOTO, words=11):
    torch.manual_seed(3)
    targets = torch.randint(1, words, (len(packed.data),))  # <pad> is never said
    return type("Batch", (), {"words": packed, "targets": targets, "photo_index": photo})


def gradients(module):
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return found


# ---- cross entropy


@pytest.mark.parametrize("alpha_c, label_smoothing", [(0.0, 0.0), (1.0, 0.0), (0.5, 0.1)])
def test_the_objective_is_cross_entropy_plus_the_doubly_stochastic_term(alpha_c, label_smoothing):
    decoder, grid, _, _, packed = make("attention")
    batch = batch_of(packed)
    scores, attention_sum, _ = decoder(grid, packed, PHOTO)
    loss = CrossEntropy(settings(alpha_c=alpha_c, label_smoothing=label_smoothing))(decoder, grid, batch, LossWeights())
    smoothed = F.cross_entropy(scores, batch.targets, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss.objective, smoothed + alpha_c * ((1 - attention_sum) ** 2).mean())
    torch.testing.assert_close(loss.value, F.cross_entropy(scores, batch.targets)), "the log has the plain one"
    assert loss.count == sum(LENGTHS)


def test_scheduled_sampling_rises_from_nothing_to_its_share(monkeypatch):
    decoder, grid, _, _, packed = make("attention")
    asked = []
    monkeypatch.setattr(module, "scheduled_sampling_forward", lambda d, g, w, p, own: asked.append(own) or d(g, w, p))
    objective = CrossEntropy(settings(scheduled_sampling=0.25, scheduled_sampling_step=0.1))
    for objective.epoch in range(5):
        objective(decoder, grid, batch_of(packed), LossWeights())
    assert asked == pytest.approx([0.1, 0.2, 0.25, 0.25])


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_learns_from_its_own_words(name):
    decoder, grid, _, _, packed = make(name)
    objective = CrossEntropy(settings(scheduled_sampling=0.5, scheduled_sampling_step=0.5))
    objective.epoch = 1
    objective(decoder.train(), grid, batch_of(packed), LossWeights()).objective.backward()
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients(decoder))


# ---- REINFORCE


def hard_of_three_cells():
    """A hard attention over three cells, without their pooling, and one caption of three words."""
    torch.manual_seed(5)
    sizes = dict(vocabulary_size=7, channels=3, embedding_size=2, attention_size=3, hidden_size=3, dropout=0.0)
    decoder = build_decoder("hard-attention", sizes).double().train()
    decoder.expectation_fraction = 0.0
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2)
    grid = Grid(2 * torch.randn(1, 3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    packed = pack_padded_sequence(torch.tensor([[START, 5, 4]]), torch.tensor([3]), batch_first=True)
    return decoder, grid, batch_of(packed, torch.tensor([0]), 7)


@pytest.mark.parametrize("baseline", [0.0, -1.7])
def test_the_expected_gradient_of_hard_attention_is_that_of_the_exact_sum_over_all_paths(monkeypatch, baseline):
    """L = sum_s p(s) log p(y | s) over all 27 paths of three looks at three cells (Xu et al. 2015, eq. 10)."""
    decoder, grid, batch = hard_of_three_cells()
    path = []
    monkeypatch.setattr(hard_attention, "sample_categorical", lambda shares: torch.tensor([[next(path)]]))
    objective = CrossEntropy(settings(entropy_weight=0.0)).double()
    expected, exact = [torch.zeros_like(p) for p in decoder.parameters()], 0
    chances = []
    for cells in itertools.product(range(3), repeat=3):
        path = iter(cells)
        scores, _, choices = decoder(grid, batch.words, batch.photo_index)
        chance = choices.log_probability.sum().exp()
        exact = exact + chance * F.cross_entropy(scores, batch.targets)
        chance = float(chance.detach())
        path = iter(cells)
        objective.reinforce.baseline.fill_(baseline)
        objective(decoder, grid, batch, LossWeights()).objective.backward()
        for total, gradient in zip(expected, gradients(decoder), strict=True):
            total += chance * gradient
        chances.append(chance)
    assert sum(chances) == pytest.approx(1) and max(chances) < 0.5
    exact.backward()
    for (name, _), ours, true in zip(decoder.named_parameters(), expected, gradients(decoder), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-8, atol=1e-10, msg=name)
        assert true.abs().max() > 1e-6, name


def test_the_baseline_is_a_moving_average_and_the_entropy_has_its_weight(monkeypatch):
    decoder, grid, batch = hard_of_three_cells()
    torch.manual_seed(0)
    scores, _, choices = decoder(grid, batch.words, batch.photo_index)
    plain = CrossEntropy(settings(reinforce_weight=0.0, entropy_weight=0.0))
    weighted = CrossEntropy(settings(reinforce_weight=0.0, entropy_weight=0.5))
    losses = []
    for objective in (plain, weighted):
        torch.manual_seed(0)
        losses.append(objective(decoder, grid, batch, LossWeights()).objective)
    torch.testing.assert_close(losses[0] - losses[1], 0.5 * choices.entropy.mean())
    mean = -float(F.cross_entropy(scores, batch.targets).detach())
    assert float(plain.reinforce.baseline) == pytest.approx(0.1 * mean)
    torch.manual_seed(0)
    plain(decoder, grid, batch, LossWeights())
    assert float(plain.reinforce.baseline) == pytest.approx(0.19 * mean)
    assert list(plain.state_dict()) == ["reinforce.baseline"], "a resumed run goes on with it"


def test_a_decoder_that_sees_the_expectation_learns_without_reinforce(monkeypatch):
    decoder, grid, batch = hard_of_three_cells()
    monkeypatch.setattr(HardAttentionDecoder, "expectation_fraction", 1.0)
    del decoder.expectation_fraction
    loss = CrossEntropy(settings(entropy_weight=0.0))(decoder, grid, batch, LossWeights())
    torch.testing.assert_close(loss.objective, loss.value)


# ---- CIDEr


PHOTOS = [Photo("", "", "train", (("a", "b"), ("b", "b"))), Photo("", "", "train", (("a",), ("b", "a", "a")))]
VOCABULARY = Vocabulary("en", "whitespace", 1, (*SPECIAL, "a", "b"))


def all_captions(longest):
    """Every caption that can be drawn: of `a` (4) and `b` (5), ended, or cut after so many words; padded."""
    for length in range(longest + 1):
        for words in itertools.product((4, 5), repeat=length):
            if length < longest:
                yield torch.tensor([*words, END, *[0] * (longest - length - 1)])
            else:
                yield torch.tensor(words)


@pytest.mark.parametrize("name", ["lstm", "adaptive", "hard-attention"])
@pytest.mark.parametrize("baseline, samples", [("leave-one-out", 2), ("greedy", 1)])
def test_the_expected_gradient_of_cider_is_that_of_the_exact_sum_over_all_captions(
    monkeypatch, name, baseline, samples
):
    """gradient of -sum_y p(y) r(y), of a vocabulary of two words and captions of at most three."""
    torch.manual_seed(6)
    sizes = dict(vocabulary_size=6, channels=3, embedding_size=2, attention_size=3, hidden_size=3, dropout=0.0)
    decoder = build_decoder(name, sizes).double().train()
    grid = Grid(torch.randn(1, 3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    objective = Cider(
        settings(objective="cider", start_from="run", samples=samples, baseline=baseline),
        CiderReward(CaptionDataset(PHOTOS, VOCABULARY, 9)),
    )
    captions = list(all_captions(3))
    with module.deterministic(decoder):
        words, targets, order = module.pack_sampled(torch.stack(captions))
        scores = decoder(grid, words, torch.zeros_like(order)).logits[:, 3:]
        each = (-F.cross_entropy(scores, targets - 3, reduction="none")).split(words.batch_sizes.tolist())
        log_p = torch.stack([F.pad(part, (0, len(captions) - len(part))) for part in each]).sum(0)
        log_p = log_p[order.argsort()]
    chances = log_p.exp()
    assert float(chances.detach().sum()) == pytest.approx(1)
    rewards = torch.from_numpy(objective.reward(np.ones(len(captions), int), torch.stack(captions).numpy()))
    (-chances @ rewards).backward()
    true = gradients(decoder)
    expected = [torch.zeros_like(gradient) for gradient in true]
    batch = type("Batch", (), {"indices": np.array([1])})
    for chosen in itertools.product(range(len(captions)), repeat=samples):
        drawn = torch.stack([captions[i] for i in ((7,) if baseline == "greedy" else ()) + chosen])
        monkeypatch.setattr(module, "sample", lambda *_, drawn=drawn: drawn[None])
        loss = objective(decoder, grid, batch, LossWeights())
        loss.objective.backward()
        assert float(loss.value) == pytest.approx(100 * float(rewards[list(chosen)].mean())) and loss.count == samples
        for total, gradient in zip(expected, gradients(decoder), strict=True):
            total += math.prod(float(chances.detach()[i]) for i in chosen) * gradient
    for (parameter, _), ours, exact in zip(decoder.named_parameters(), expected, true, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-10, msg=parameter)
    assert sum(gradient.abs().sum() for gradient in true) > 0.01


def test_cider_of_two_batches_adds_up_to_that_of_both_together(monkeypatch):
    decoder, grid, *_ = make("attention")
    captions = torch.tensor([[[4, 5, END], [5, END, 0]], [[4, END, 0], [5, 5, 4]], [[5, 4, END], [4, 4, END]]])
    reward = CiderReward(CaptionDataset(PHOTOS * 2, VOCABULARY, 9))
    objective = Cider(settings(objective="cider", start_from="run", samples=2), reward)
    found = []
    for parts in ([[0, 1, 2]], [[0], [1, 2]]):
        for part in parts:
            monkeypatch.setattr(module, "sample", lambda *_, part=part: captions[part])
            batch = type("Batch", (), {"indices": np.array(part)})
            share = LossWeights(photos=len(part) / 3)
            objective(decoder, grid.select(torch.tensor(part)), batch, share).objective.backward()
        found.append(gradients(decoder))
    for whole, added in zip(*found, strict=True):
        torch.testing.assert_close(whole, added)


# ---- how the weights are updated


def test_the_learning_rate_follows_its_schedule():
    step, cosine = settings(lr_decay=0.5, lr_decay_every=3), settings(schedule="cosine", epochs=10)
    assert [learning_rate_factor(step, epoch, epoch + 0.1) for epoch in (0, 2.99, 3, 6)] == [1, 1, 0.5, 0.25]
    assert [learning_rate_factor(cosine, epoch, epoch + 0.1) for epoch in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], 1.0), 40)
    for update in range(40):
        assert learning_rate_factor(cosine, update / 4, (update + 1) / 4) == pytest.approx(reference.get_last_lr()[0])
        reference.optimizer.step()
        reference.step()
    warm = settings(warmup_epochs=2.0, lr_decay=0.5, lr_decay_every=3)
    assert [learning_rate_factor(warm, time, time + 0.5) for time in (0, 1, 1.5, 2, 3)] == [0.25, 0.75, 1, 1, 0.5]


def test_weights_decay_but_biases_and_norms_do_not():
    decoder = make("lstm")[0]
    decays, stays = parameter_groups({"learning_rate": decoder.parameters()}, 0.1)
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    assert {names[p] for p in decays["params"]} == {
        "photo_projection.weight",
        "embedding.weight",
        "recurrent.weight_ih_l0",
        "recurrent.weight_hh_l0",
        "output_layer.weight",
    }
    assert len(decays["params"]) + len(stays["params"]) == len(names)
    assert decays["weight_decay"] == 0.1 and stays["weight_decay"] == 0
