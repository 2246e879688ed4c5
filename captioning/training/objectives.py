"""What training minimises. An objective is a module with one method; a new one is a class and a line in OBJECTIVES.

Letters: B photos, R captions, W words of all captions, P cells, V vocabulary, K captions drawn of a photo.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from captioning.dataset.batches import Batch
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.decoders.protocol import DecoderOutput, HardSamples, upcast
from captioning.encoders.grid import Grid
from captioning.search.beam_search import banned_ids
from captioning.search.sampling import deterministic, pack_sampled, sample, scheduled_sampling_forward
from captioning.training.cider_reward import CiderReward
from captioning.training.options import TrainingOptions
from preprocess.vocabulary import PAD


class Loss(NamedTuple):
    objective: Tensor  # scalar: what is minimised, this batch's share of it
    value: Tensor  # scalar, for the log: a mean over ...
    count: int  # ... so many words or captions


class LossWeights(NamedTuple):
    """A batch's share of one update of the weights, which may add up several batches and several ranks.

    The means of a loss are over the words, captions and photos of the whole update, however it is divided.
    """

    words: float = 1.0
    captions: float = 1.0
    photos: float = 1.0


class Objective(Protocol):
    measures: str  # what Loss.value is: loss or reward
    epoch: int  # 0 in the first: some objectives change as training goes on

    def forward(self, decoder: nn.Module, grid: Grid, batch: Batch, share: LossWeights) -> Loss:
        """What the decoder, in training mode, makes of the photos of this grid."""


class CrossEntropy(nn.Module):
    """L = -mean log p(y_t) + alpha_c mean((1 - sum_t a_t)^2)   (Xu et al. 2015, eq. 14)

    The second term, doubly stochastic attention, is the mean over captions and cells: over a caption, each cell is
    looked at about once. A decoder without attention has none. A decoder that draws has REINFORCE's instead. Where the
    word to be said is <pad>, nothing counts.

    label_smoothing e: the true word's target is 1 - e, and e is spread over the vocabulary (Szegedy et al. 2016).
    scheduled_sampling: in epoch i, from 0, min(this, i * sampling_rise) of the words that are read are the decoder's
    own (Bengio et al. 2015).
    """

    measures = "loss"

    def __init__(self, options: TrainingOptions):
        super().__init__()
        self.alpha_c, self.label_smoothing, self.epoch = options.alpha_c, options.label_smoothing, 0
        self.max_sampling_prob, self.sampling_step = options.scheduled_sampling, options.scheduled_sampling_step
        self.reinforce = Reinforce(options.reinforce_weight, options.entropy_weight)

    def forward(self, decoder: nn.Module, grid: Grid, batch: Batch, share: LossWeights) -> Loss:
        scores, attention_sum, choices = self._read(decoder, grid, batch)
        scores = upcast(scores)
        objective = cross_entropy = F.cross_entropy(scores, batch.targets, ignore_index=PAD)
        if self.label_smoothing:
            objective = F.cross_entropy(scores, batch.targets, ignore_index=PAD, label_smoothing=self.label_smoothing)
        said = batch.targets != PAD  # (W,)
        if choices is not None:
            log_probabilities = -F.cross_entropy(scores.detach(), batch.targets, ignore_index=PAD, reduction="none")
            objective = objective + self.reinforce(choices, log_probabilities, said, batch.words.batch_sizes)
        objective = share.words * objective
        if attention_sum is not None and self.alpha_c:
            captions = said[: len(attention_sum)]  # every caption says something at the first step
            uneven = (1 - attention_sum).square().mean(1)
            objective = objective + share.captions * self.alpha_c * (uneven * captions).sum() / captions.sum()
        return Loss(objective, cross_entropy.detach(), len(batch.targets))

    def _read(self, decoder: nn.Module, grid: Grid, batch: Batch) -> DecoderOutput:
        own = min(self.max_sampling_prob, self.epoch * self.sampling_step)
        if own:
            return scheduled_sampling_forward(decoder, grid, batch.words, batch.photo_index, own)
        return decoder(grid, batch.words, batch.photo_index)


class Reinforce(nn.Module):
    """L_s = -mean_t[ weight (R_t - b_t) log p(s_t) + entropy_weight H(s_t) ]   (Xu et al. 2015, eq. 11-12)

    R_t = sum_{u >= t} log p(y_u), of which no gradient is taken. The paper credits each choice s_t with the whole
    caption; the words before it owe it nothing, so leaving them out keeps the expected gradient and much less chance.
    b_t is the moving average of a word's log-probability, 0.9 old and 0.1 new, times the words left; each rank has its
    own, since any that does not look at s_t will do.
    """

    def __init__(self, weight: float, entropy_weight: float):
        super().__init__()
        self.weight, self.entropy_weight = weight, entropy_weight
        self.register_buffer("baseline", torch.zeros(()))

    def forward(self, choices: HardSamples, log_probabilities: Tensor, said: Tensor, batch_sizes: Tensor) -> Tensor:
        """choices, log_probabilities and said, bool (W,), packed with these batch sizes -> scalar."""

        def from_here_on(values: Tensor) -> Tensor:
            """(W,) -> (W,): the sum over what is left of each caption."""
            padded, lengths = pad_packed_sequence(PackedSequence(values, batch_sizes))
            return pack_padded_sequence(padded.flip(0).cumsum(0).flip(0), lengths).data

        advantage = from_here_on(log_probabilities) - self.baseline * from_here_on(said)
        self.baseline.lerp_((log_probabilities.sum() / said.sum()).to(self.baseline), 0.1)
        chosen = self.weight * advantage * choices.log_probability + self.entropy_weight * choices.entropy
        return -(chosen * said).sum() / said.sum()


class Cider(nn.Module):
    """The expected CIDEr-D of captions that the decoder draws, by REINFORCE with a baseline of its own.

        gradient = -mean_k (r_k - b_k) d log p(caption k)

    leave-one-out: b_k is the mean of the photo's other rewards (Luo 2020); greedy: the reward of the photo's greedy
    caption, self-critical training (Rennie et al. 2017). The mean is over the captions drawn, log p is summed over the
    words, <end> among them, and what may never be written is no part of p: without dropout the gradient is unbiased.
    Captions are drawn as the decoder captions, without dropout; it learns from them with it, for else the rewards of
    the photos it learns from rise long after those of others.
    """

    measures = "reward"

    def __init__(self, options: TrainingOptions, reward: CiderReward):
        super().__init__()
        self.reward, self.samples, self.epoch = reward, options.samples, 0
        self.max_length = options.max_length
        self.greedy = options.baseline == "greedy"

    def forward(self, decoder: nn.Module, grid: Grid, batch: Batch, share: LossWeights) -> Loss:
        with deterministic(decoder):
            drawn = sample(decoder, grid, self.samples, self.max_length, self.greedy)  # (B, K, T)
            captions = drawn.flatten(0, 1).cpu().numpy()
            rewards = self.reward(batch.indices.repeat(drawn.shape[1]), captions)
            rewards = torch.from_numpy(rewards).to(drawn.device).view(drawn.shape[:2])  # (B, K)
            if self.greedy:
                drawn, baseline, rewards = drawn[:, 1:], rewards[:, :1], rewards[:, 1:]
            else:
                baseline = (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)
        words, targets, order = pack_sampled(drawn.flatten(0, 1))
        with deterministic(decoder, but_dropout=True):
            scores = upcast(decoder(grid, words, order // self.samples).logits)
        scores = scores.index_fill(1, banned_ids(scores.device), -torch.inf)
        log_probabilities = -F.cross_entropy(scores, targets, reduction="none")  # (W,)
        advantage = (rewards - baseline).flatten()[order].to(scores)
        advantage = torch.cat([advantage[:rows] for rows in words.batch_sizes.tolist()])
        objective = -share.photos * (advantage * log_probabilities).sum() / len(order)
        return Loss(objective, 100 * rewards.mean(), len(order))


def make_cross_entropy(options: TrainingOptions, train: CaptionDataset) -> CrossEntropy:
    return CrossEntropy(options)


def make_cider(options: TrainingOptions, train: CaptionDataset) -> Cider:
    return Cider(options, CiderReward(train))
