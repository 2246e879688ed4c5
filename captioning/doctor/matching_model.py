"""A small model of which photo a caption belongs to.

A caption is the mean of the vectors of its terms. A context is what a photo shows, its mean feature, and what its other
captions say. Both are projected to unit vectors; their scaled cosine is the score, trained to be highest for a caption
and its own photo among those of a batch (symmetric cross-entropy, Radford et al. 2021, "Learning Transferable Visual
Models From Natural Language Supervision", https://arxiv.org/abs/2103.00020, figure 3). In training, a context lacks one
of its halves at times, so each half is also a context alone.

Letters: N photos, C captions, L terms of the longest, V vocabulary, B photos of a batch, R rows, F channels of the
features, H size of the vectors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning.runtime.progress import tqdm
from preprocess.captions import Photo
from preprocess.languages import LANGUAGES

VECTOR_SIZE = 128
MIN_COUNT = 5  # captions in which a term occurs
MAX_TERMS = 40  # of a caption
EPOCHS = 12
MIN_STEPS = 200  # more epochs for a small data set
BATCH_SIZE = 256  # photos
ROUNDS = 5  # captions of each photo in a batch
LEARNING_RATE = 2e-3
WARMUP = 0.2  # of the steps: the learning rate rises, and then falls to 0 as a cosine
DROP_HALF = 0.25  # probability that a context lacks its photo, and that it lacks its captions


class CaptionTerms(NamedTuple):
    """All captions of a data set as terms.

    terms (C, L) int64: 0 pads. weights (V,) float32: the inverse document frequency of each term, 0 of the padding.
    owner (C,) int64: the photo of each caption. first, count (N,) int64: the captions of photo i are first[i] to
    first[i] + count[i] - 1.
    """

    terms: Tensor
    weights: Tensor
    owner: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, photos: Sequence[Photo], language: str) -> CaptionTerms:
        """The terms of the captions that occur in at least MIN_COUNT captions."""
        captions = [[*dict.fromkeys(terms_of(caption, language))] for photo in photos for caption in photo.captions]
        frequency = Counter(term for caption in captions for term in caption)
        ids = {
            term: id for id, (term, n) in enumerate(((t, n) for t, n in frequency.most_common() if n >= MIN_COUNT), 1)
        }
        known = [[ids[term] for term in caption if term in ids][:MAX_TERMS] for caption in captions]
        terms = torch.zeros(len(known), max(1, *map(len, known)), dtype=torch.int64)
        for row, caption in zip(terms, known, strict=True):
            row[: len(caption)] = torch.tensor(caption, dtype=torch.int64)
        weights = torch.tensor([0.0, *(math.log(len(captions) / frequency[term]) for term in ids)])
        count = torch.tensor([len(photo.captions) for photo in photos])
        owner = torch.arange(len(photos)).repeat_interleave(count)
        return cls(terms, weights, owner, count.cumsum(0) - count, count)

    def to(self, device: torch.device) -> CaptionTerms:
        """The same on a device."""
        return CaptionTerms(*(tensor.to(device) for tensor in self))


def terms_of(caption: Sequence[str], language: str) -> Iterator[str]:
    """The words of a caption, and each two that follow one another; in a language without spaces, their characters."""
    yield from caption
    if LANGUAGES[language].has_spaces:
        yield from map(" ".join, pairwise(caption))
    else:
        yield from (character for word in caption if len(word) > 1 for character in word)


class MatchingModel(nn.Module):
    """Captions and contexts as unit vectors, (R, H) float32; `scale` times their product is the score."""

    def __init__(self, vocab_size: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, VECTOR_SIZE)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.photo = nn.Linear(channels, VECTOR_SIZE)
        self.siblings = nn.Linear(VECTOR_SIZE, VECTOR_SIZE)
        self.joint = nn.Linear(VECTOR_SIZE, VECTOR_SIZE)
        self.caption = nn.Linear(VECTOR_SIZE, VECTOR_SIZE)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    @property
    def scale(self) -> Tensor:
        """What the cosines are multiplied by."""
        return self.log_scale.exp()

    def embed_terms(self, terms: Tensor, weights: Tensor) -> Tensor:
        """Terms (R, L) and the weights of all terms (V,) -> text vectors (R, H)."""
        bags = F.embedding_bag(terms, self.embedding.weight, mode="sum", per_sample_weights=weights[terms])
        return F.normalize(bags, dim=1)

    def embed_captions(self, texts: Tensor) -> Tensor:
        """Text vectors (R, H) -> captions (R, H)."""
        return F.normalize(self.caption(texts), dim=1)

    def embed_contexts(self, photos: Tensor | float, siblings: Tensor | float) -> Tensor:
        """Projected features (R, H) and projected mean texts of the other captions (R, H) -> contexts (R, H)."""
        return F.normalize(self.joint(F.relu(photos + siblings)), dim=1)


def train_model(captions: CaptionTerms, features: Tensor, photos: Tensor, name: str) -> MatchingModel:
    """A model trained on some photos. features (N, F) float32. photos (R,) int64. name: of the progress bar."""
    model = MatchingModel(len(captions.weights), features.shape[1]).to(features.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    batch_size = min(BATCH_SIZE, len(photos))
    steps_per_epoch = len(photos) // batch_size
    epochs = max(EPOCHS, -(-MIN_STEPS // steps_per_epoch))
    steps = epochs * steps_per_epoch

    def rate(step: int) -> float:
        return min(1, (step + 1) / (WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    with tqdm(total=steps, desc=name, unit="step") as bar:
        for _ in range(epochs):
            order = photos[torch.randperm(len(photos), device=photos.device)]
            for batch in order[: steps_per_epoch * batch_size].split(batch_size):
                loss = _batch_loss(model, captions, features, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()


def _batch_loss(model: MatchingModel, captions: CaptionTerms, features: Tensor, batch: Tensor) -> Tensor:
    """The loss of ROUNDS captions of each photo of a batch (B,), each against one context of each photo."""
    count = captions.count[batch]
    place = torch.arange(len(batch), device=batch.device)  # of each photo in the batch
    owner = place.repeat_interleave(count)
    first = count.cumsum(0) - count
    rows = captions.first[batch][owner] + torch.arange(len(owner), device=batch.device) - first[owner]
    texts = model.embed_terms(captions.terms[rows], captions.weights)
    total = torch.zeros(len(batch), VECTOR_SIZE, device=batch.device).index_add(0, owner, texts)
    projected = model.photo(F.dropout(features[batch], 0.3))
    shift = torch.randint(int(count.max()), (len(batch),), device=batch.device)
    losses = []
    for turn in range(ROUNDS):
        text = texts[first + (shift + turn) % count]  # of one caption of each photo
        others = model.siblings(F.dropout((total - text) / (count - 1).clamp_min(1)[:, None], 0.2))
        keep = torch.rand(len(batch), 2, device=batch.device) > DROP_HALF
        keep |= ~keep.any(1, keepdim=True)
        contexts = model.embed_contexts(projected * keep[:, :1], others * keep[:, 1:])
        scores = model.scale * model.embed_captions(F.dropout(text, 0.2)) @ contexts.T  # (B, B)
        losses.append(F.cross_entropy(scores, place) + F.cross_entropy(scores.T, place))
    return torch.stack(losses).mean()
