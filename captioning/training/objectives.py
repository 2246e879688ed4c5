"""Training objectives: what training minimises.

To add one, write an nn.Module that implements `Objective` and a factory (options, train dataset) -> Objective, and
register the factory in OBJECTIVES (captioning/training/__init__.py). Its settings are fields of TrainingOptions. State
that it updates while training must be in its state_dict, so that a resumed run continues it.

Letters: B photos, R captions, W words of all captions packed, P cells, V vocabulary size, K captions sampled per photo,
T words of the longest sample.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from captioning.dataset.batches import Batch
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.decoders.protocol import DecoderOutput, HardSamples, upcast
from captioning.encoders.grid import Grid
from captioning.search.beam_search import banned_ids
from captioning.search.graphs import DecodingGraphs
from captioning.search.sampling import deterministic, pack_sampled, sample, scheduled_sampling_forward
from captioning.training.cider_reward import CiderReward
from captioning.training.options import TrainingOptions
from preprocess.vocabulary import PAD


class Loss(NamedTuple):
    """The loss of one batch."""

    objective: Tensor  # scalar: minimised; the contribution of this batch to its update
    value: Tensor  # scalar, detached, for the log: a mean over Objective.count words or captions


class LossWeights(NamedTuple):
    """The fraction of an update's words, captions and photos that are in this batch.

    An update may accumulate several batches on several processes. A loss multiplies each of its means by the fraction
    of what it averages over, so that the sum over the batches is the mean over the whole update.
    """

    words: float = 1.0
    captions: float = 1.0
    photos: float = 1.0


class Objective(Protocol):
    """An nn.Module: called like its forward, moved to the device and saved with state_dict."""

    quantity: str  # what Loss.value is, for the log: "loss" or "reward"
    epoch: int  # set by the trainer, from 0: some objectives change during training
    prepares: bool  # whether `prepare` has work to do; else it is not called

    def prepare(self, decoder: nn.Module, grid: Grid, batch: Batch) -> Batch:
        """Do what the loss needs of the CPU, without gradients. Returns the batch to call the objective with.

        Its captions, rewards and advantages are on the CPU, as those of a batch that was just loaded.
        """

    def __call__(self, decoder: nn.Module, grid: Grid, batch: Batch, weights: LossWeights) -> Loss:
        """Return the loss of a prepared batch on the device: work of the device alone, which a CUDA graph may repeat.

        The decoder is in training mode; grid: the photos' features. Words whose target is <pad> do not count.
        """

    def count(self, batch: Batch) -> int:
        """Return the number of words or captions that Loss.value averages over."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore a state_dict."""
        ...


class CrossEntropy(nn.Module):
    """L = -mean log p(y_t) + alpha_c mean((1 - sum_t a_t)^2)   (Xu et al. 2015, eq. 14, https://arxiv.org/abs/1502.03044)

    The second term, doubly stochastic attention, is a mean over captions and cells: over a caption, each cell should
    receive about one unit of attention. It is absent for a decoder without attention. A decoder that samples its
    attention adds the REINFORCE term. Positions whose target is <pad> are ignored.

    label_smoothing e: the target of the true word is 1 - e, and e is spread over the vocabulary (Szegedy et al. 2016,
    https://arxiv.org/abs/1512.00567).
    scheduled_sampling: in epoch i, from 0, each input word is replaced by the decoder's own sample with probability
    min(scheduled_sampling, i * scheduled_sampling_step) (Bengio et al. 2015, https://arxiv.org/abs/1506.03099).
    """

    quantity = "loss"
    prepares = False

    def __init__(self, options: TrainingOptions):
        super().__init__()
        self.alpha_c = options.alpha_c
        self.label_smoothing = options.label_smoothing
        self.max_sampling_prob = options.scheduled_sampling
        self.sampling_step = options.scheduled_sampling_step
        self.epoch = 0
        self.reinforce = Reinforce(options.reinforce_weight, options.entropy_weight)

    def prepare(self, decoder: nn.Module, grid: Grid, batch: Batch) -> Batch:
        """Nothing to do."""
        return batch

    def forward(self, decoder: nn.Module, grid: Grid, batch: Batch, weights: LossWeights) -> Loss:
        """See Objective."""
        logits, attention_sum, samples = self._decode(decoder, grid, batch)
        logits = upcast(logits)
        objective = cross_entropy = F.cross_entropy(logits, batch.targets, ignore_index=PAD)
        if self.label_smoothing:
            objective = F.cross_entropy(logits, batch.targets, ignore_index=PAD, label_smoothing=self.label_smoothing)
        mask = batch.targets != PAD  # (W,)
        if samples is not None:
            log_probabilities = -F.cross_entropy(logits.detach(), batch.targets, ignore_index=PAD, reduction="none")
            objective = objective + self.reinforce(samples, log_probabilities, mask, batch.words.batch_sizes)
        objective = weights.words * objective
        if attention_sum is not None and self.alpha_c:
            caption_mask = mask[: len(attention_sum)]  # the first step has a target for every real caption
            penalty = _coverage_penalty(attention_sum, caption_mask)
            objective = objective + weights.captions * self.alpha_c * penalty
        return Loss(objective, cross_entropy.detach())

    def count(self, batch: Batch) -> int:
        """The words of the batch."""
        return len(batch.targets)

    def _decode(self, decoder: nn.Module, grid: Grid, batch: Batch) -> DecoderOutput:
        sampling_prob = min(self.max_sampling_prob, self.epoch * self.sampling_step)
        if sampling_prob:
            return scheduled_sampling_forward(decoder, grid, batch.words, batch.photo_index, sampling_prob)
        return decoder(grid, batch.words, batch.photo_index)


def _coverage_penalty(attention_sum: Tensor, mask: Tensor) -> Tensor:
    """The mean of (1 - attention_sum)^2 over the captions in the mask (R,) bool; attention_sum (R, P) -> scalar."""
    penalty = (1 - attention_sum).square().mean(1)  # (R,)
    return (penalty * mask).sum() / mask.sum()


class Reinforce(nn.Module):
    """L_s = -mean_t[ weight (R_t - b_t) log p(s_t) + entropy_weight H(s_t) ]

    (Xu et al. 2015, eq. 11-12, https://arxiv.org/abs/1502.03044). R_t = sum_{u >= t} log p(y_u), without gradient. The
    paper rewards each sampled cell s_t with the log-probability of the whole caption. The words before t do not depend
    on s_t, so leaving them out keeps the expected gradient and reduces its variance. b_t is an exponential moving
    average of the log-probability of a word (0.9 old, 0.1 new) times the number of words left. Each process has its
    own: any baseline that does not depend on s_t leaves the expected gradient unchanged.
    """

    baseline: Tensor  # scalar

    def __init__(self, weight: float, entropy_weight: float):
        super().__init__()
        self.weight = weight
        self.entropy_weight = entropy_weight
        self.register_buffer("baseline", torch.zeros(()))

    def forward(self, samples: HardSamples, log_probabilities: Tensor, mask: Tensor, batch_sizes: Tensor) -> Tensor:
        """Return the loss, a scalar. samples, log_probabilities, mask (bool): (W,), packed with these batch sizes."""
        returns = _sum_of_rest(log_probabilities, batch_sizes)
        words_left = _sum_of_rest(mask, batch_sizes)
        advantage = returns - self.baseline * words_left
        mean_log_probability = log_probabilities.sum() / mask.sum()
        self.baseline.lerp_(mean_log_probability.to(self.baseline), 0.1)
        terms = self.weight * advantage * samples.log_probability + self.entropy_weight * samples.entropy
        return -(terms * mask).sum() / mask.sum()


def _sum_of_rest(values: Tensor, batch_sizes: Tensor) -> Tensor:
    """(W,) packed -> (W,) packed: the sum of the values from each word to the end of its caption."""
    padded, lengths = pad_packed_sequence(PackedSequence(values, batch_sizes))
    sums = padded.flip(0).cumsum(0).flip(0)
    return pack_padded_sequence(sums, lengths).data


class Cider(nn.Module):
    """Maximises the expected CIDEr-D of sampled captions, by REINFORCE with a baseline.

        gradient = -mean_k (r_k - b_k) d log p(caption k)

    The baseline b_k is the mean reward of the photo's other samples (leave-one-out; Luo 2020,
    https://arxiv.org/abs/2003.09971) or the reward of its greedy caption (greedy, self-critical sequence training;
    Rennie et al. 2017, https://arxiv.org/abs/1612.00563). The mean is over the sampled captions; log p is summed over
    the words, with <end>. Words that are never generated, such as <unk>, have probability 0. Without dropout, the
    gradient is therefore unbiased.

    Captions are sampled without dropout, as in captioning, but their log p is computed with it. Otherwise the reward of
    the training photos rises long after that of others has stopped.
    """

    quantity = "reward"
    prepares = True

    def __init__(self, options: TrainingOptions, reward: CiderReward):
        super().__init__()
        self.reward = reward
        self.samples = options.samples
        self.max_length = options.max_length
        self.greedy_baseline = options.baseline == "greedy"
        self.epoch = 0
        self.graphs: DecodingGraphs | None = None  # to sample with; set by the trainer

    @torch.no_grad()
    def prepare(self, decoder: nn.Module, grid: Grid, batch: Batch) -> Batch:
        """Sample captions of the photos and reward them: their words and rewards, on the CPU, are the new batch's."""
        captions, rewards, baseline = self._sample(decoder, grid, batch)
        words, targets, order = pack_sampled(captions.flatten(0, 1))
        # float32, except for a decoder in float64: MPS does not have float64
        dtype = torch.promote_types(grid.cells.dtype, torch.float32)
        return replace(
            batch,
            words=words,
            targets=targets,
            photo_index=order // self.samples,
            rewards=rewards.flatten()[order].to(dtype),
            advantages=(rewards - baseline).flatten()[order].to(dtype),
        )

    def forward(self, decoder: nn.Module, grid: Grid, batch: Batch, weights: LossWeights) -> Loss:
        """See Objective. Loss.value is the mean reward, times 100."""
        assert batch.rewards is not None and batch.advantages is not None, "the batch must be prepared"
        log_probabilities = self._log_probabilities(decoder, grid, batch)
        batch_sizes = batch.words.batch_sizes.tolist()
        advantages = torch.cat([batch.advantages[:size] for size in batch_sizes])  # (W,)
        captions = (batch.targets[: batch.num_captions] != PAD).sum()  # each has a target at the first step
        objective = -weights.photos * (advantages * log_probabilities).sum() / captions
        return Loss(objective, 100 * batch.rewards.sum() / captions)

    def count(self, batch: Batch) -> int:
        """The captions sampled for the photos of the batch."""
        return len(batch.indices) * self.samples

    def _sample(self, decoder: nn.Module, grid: Grid, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Captions (B, K, T) int64, their rewards (B, K) and the baselines (B, K) or (B, 1), float64; on the CPU."""
        with deterministic(decoder):
            captions = sample(decoder, grid, self.samples, self.max_length, self.greedy_baseline, self.graphs)
        # The weights that autocast converted have no gradients; the loss must convert them again.
        torch.clear_autocast_cache()
        captions = captions.cpu()
        photos = batch.indices.repeat(captions.shape[1])
        scores = self.reward(photos, captions.flatten(0, 1).numpy())
        rewards = torch.from_numpy(scores).view(captions.shape[:2])
        if self.greedy_baseline:  # the first caption of each photo is the greedy one
            return captions[:, 1:], rewards[:, 1:], rewards[:, :1]
        return captions, rewards, (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)

    def _log_probabilities(self, decoder: nn.Module, grid: Grid, batch: Batch) -> Tensor:
        """(W,) float32: log p of the target words, with dropout; 0 where the target is <pad>."""
        with deterministic(decoder, keep_dropout=True):
            logits = upcast(decoder(grid, batch.words, batch.photo_index).logits)
        logits = logits.index_fill(1, banned_ids(logits.device), -torch.inf)
        return -F.cross_entropy(logits, batch.targets, ignore_index=PAD, reduction="none")


def make_cross_entropy(options: TrainingOptions, train: CaptionDataset) -> CrossEntropy:
    """The factory of --objective cross-entropy, which needs nothing of the dataset."""
    return CrossEntropy(options)


def make_cider(options: TrainingOptions, train: CaptionDataset) -> Cider:
    """The factory of --objective cider. train: the references, and the document frequencies of their n-grams.

    Prints a line if every reward will be 0.
    """
    reward = CiderReward(train)
    if reward.is_zero:
        print(
            "--objective cider: every reward will be 0: CIDEr-D weighs words by how few photos they describe, and the "
            f"train split of {options.data} has one photo, or the same captions for all; give more photos, or train "
            "with --objective cross-entropy"
        )
    return Cider(options, reward)
