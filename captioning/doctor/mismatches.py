"""Captions that fit another photo better than their own.

The photos are divided into folds. A model trained on the other folds scores each caption against all photos, so no
caption is judged by a model that has learnt it. What tells a wrong caption from an unusual one is learnt from
counterfeits: each caption is also put in the place of a caption of a random photo, and a classifier tells the two kinds
apart by how well the caption fits this photo, the photo's other captions, the words of the photos most like it, and the
best of all other photos.

Letters: N photos, C captions, R some captions, B a chunk of them, L terms of the longest, V vocabulary, K neighbours, H
size of the vectors, F channels of the features, E kinds of evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioning.doctor.findings import Check, Finding, worst_first
from captioning.doctor.matching_model import CaptionTerms, MatchingModel, train_model
from preprocess.captions import Photo

FOLDS = 3
MODELS = 2  # of each fold; the mean of their scores counts
SEED = 0
CHUNK = 512  # captions that are scored against all photos at once
NEIGHBOURS = 32  # photos most like a photo, whose words are expected in its captions
PRIOR_CAPTIONS = 40  # captions of the whole data set that count as if they were the neighbours', too
MIN_LOG_ODDS = 3.0  # of a finding; where one caption in a hundred is wrong, this is one right in six
CLASSIFIER_STEPS = 750
CLASSIFIER_UNITS = 32


def check_mismatches(photos: Sequence[Photo], pooled: Tensor, language: str) -> Check:
    """The check. pooled: (N, F) float32, the mean feature of each photo, on the device that computes."""
    captions = CaptionTerms.of(photos, language).to(pooled.device)
    log_odds, best = find_mismatches(captions, pooled)
    texts = [caption for photo in photos for caption in photo.captions]
    findings = []
    for row in (log_odds > MIN_LOG_ODDS).nonzero().flatten().tolist():
        own, other = photos[captions.owner[row]], photos[best[row]]
        note = f"fits {other.id} better; log-odds {log_odds[row]:.1f}"
        findings.append(Finding(float(log_odds[row]), note, (own, other), texts[row]))
    return Check(
        "mismatches",
        "Captions that fit another photo better",
        "Judged by models that never saw the photo or its captions. The second photo is the one that fits best.",
        worst_first(findings),
    )


def find_mismatches(captions: CaptionTerms, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """The log-odds that each caption is at the wrong photo (C,) float32, and the other photo that fits best (C,) int64.

    The odds are those among equal numbers of a data set's own captions and of counterfeits. pooled: (N, F) float32.
    """
    features = F.normalize(pooled.sign() * pooled.abs().sqrt(), dim=1) * 4  # else a few channels outweigh all others
    with torch.random.fork_rng([pooled.device] if pooled.device.type == "cuda" else []):
        torch.manual_seed(SEED)
        folds = torch.randperm(len(features), device=pooled.device) % FOLDS
        parts = [judge_fold(captions, features, folds, fold) for fold in range(FOLDS)]
        rows, real, counterfeit, best = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        fold_of = folds[captions.owner[rows]]
        log_odds = torch.empty(len(rows), device=pooled.device)
        for fold in range(FOLDS):
            torch.manual_seed(SEED + fold)
            classifier = train_classifier(real[fold_of != fold], counterfeit[fold_of != fold])
            log_odds[fold_of == fold] = classifier(real[fold_of == fold])
    order = rows.argsort()
    return log_odds[order], best[order]


def judge_fold(captions: CaptionTerms, features: Tensor, folds: Tensor, fold: int) -> Evidence:
    """The evidence of the captions of a fold, by models of the others. folds (N,) int64: of each photo."""
    train = (folds != fold).nonzero().flatten()
    models = []
    for number in range(MODELS):
        torch.manual_seed(SEED + fold * MODELS + number)
        name = f"matching captions, fold {fold + 1} of {FOLDS}, model {number + 1} of {MODELS}"
        models.append(train_model(captions, features, train, name))
    torch.manual_seed(SEED + fold)
    return gather_evidence(models, captions, features, (folds == fold).nonzero().flatten())


class Evidence(NamedTuple):
    """What a classifier learns from.

    rows (R,) int64: captions. real, counterfeit (R, E) float32: how each caption fits its own photo, and a random one.
    best (R,) int64: the other photo that it fits best.
    """

    rows: Tensor
    real: Tensor
    counterfeit: Tensor
    best: Tensor


@torch.inference_mode()
def gather_evidence(
    models: Sequence[MatchingModel], captions: CaptionTerms, features: Tensor, photos: Tensor
) -> Evidence:
    """The evidence of all captions of the photos (R,) int64, none of which the models have seen. features: (N, F)."""
    measure = _Measure(models, captions, features)
    in_fold = torch.zeros(len(features), dtype=torch.bool, device=photos.device).index_fill(0, photos, True)
    rows = in_fold[captions.owner].nonzero().flatten()
    others = photos[torch.randint(len(photos), rows.shape, device=photos.device)]
    place = torch.randint(int(captions.count.max()), rows.shape, device=photos.device) % captions.count[others]
    elsewhere = measure.elsewhere(rows)
    home = measure.fit[rows]  # a counterfeit's own photo is one of the others
    elsewhere_of_counterfeit = elsewhere._replace(
        log_sum=torch.logaddexp(elsewhere.log_sum, home), highest=torch.maximum(elsewhere.highest, home)
    )
    return Evidence(
        rows,
        measure(rows, rows, elsewhere),
        measure(rows, captions.first[others] + place, elsewhere_of_counterfeit),
        elsewhere.best,
    )


class _Elsewhere(NamedTuple):
    """How captions fit all photos but their own: the log of the summed exponentials of their scores (R,), the highest
    score (R,), and the photo that has it (R,)."""

    log_sum: Tensor
    highest: Tensor
    best: Tensor


class _Measure:
    """How well captions fit photos, in the places of captions of these photos.

    The vectors of all models stand side by side, so that a product is the mean of their scores.

    Attributes: texts, vectors (C, H): of each caption. without, siblings (C, H): the context of each caption's photo
    without the caption, and that of the photo's other captions alone. full, photo (N, H): the context of each photo
    with all captions, and without any. fit (C,): the score of each caption in its own place. total_fit (N,): their sum.
    frequency (V,): the fraction of all captions that have a term.
    """

    def __init__(self, models: Sequence[MatchingModel], captions: CaptionTerms, features: Tensor):
        self.captions = captions
        parts = zip(*(_vectors_of(model, captions, features) for model in models), strict=True)
        self.texts, vectors, self.full, self.photo, self.without, self.siblings = (
            torch.cat(tensors, dim=1) for tensors in parts
        )
        self.vectors = vectors / len(models)
        self.fit = (self.vectors * self.without).sum(1)
        self.total_fit = torch.zeros(len(features), device=features.device).index_add(0, captions.owner, self.fit)
        self.frequency = captions.terms.flatten().bincount(minlength=len(captions.weights)) / len(captions.owner)

    def elsewhere(self, rows: Tensor) -> _Elsewhere:
        """How the captions `rows` (R,) fit all photos but their own."""
        parts = []
        for chunk in rows.split(CHUNK):
            scores = self.vectors[chunk] @ self.full.T  # (B, N)
            scores.scatter_(1, self.captions.owner[chunk][:, None], float("-inf"))
            parts.append((scores.logsumexp(1), *scores.max(1)))
        return _Elsewhere(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def __call__(self, rows: Tensor, places: Tensor, elsewhere: _Elsewhere) -> Tensor:
        """The evidence (R, E) of the captions `rows` (R,), each in the place of the caption `places` (R,)."""
        captions, vectors = self.captions, self.vectors[rows]
        owner = captions.owner[places]
        scores = (vectors * self.without[places]).sum(1)
        nearest, agreement, shared = self._compare_with_siblings(rows, places)
        expected, known = self._compare_with_neighbours(rows, places)
        weights = captions.weights[captions.terms[rows]]  # (R, L)
        total_weight = weights.sum(1)
        evidence = [
            scores,
            (vectors * self.photo[owner]).sum(1),
            (vectors * self.siblings[places]).sum(1),
            elsewhere.log_sum - scores,
            elsewhere.highest - scores,
            (self.total_fit[owner] - self.fit[places]) / (captions.count[owner] - 1).clamp_min(1),  # of other captions
            nearest,
            agreement,
            expected,
            (weights * known).sum(1) / total_weight.clamp_min(1e-6),
            (weights * shared).sum(1) / total_weight.clamp_min(1e-6),
            total_weight,
            total_weight / (weights > 0).sum(1).clamp_min(1),
        ]
        return torch.stack(evidence, dim=1)

    def _compare_with_siblings(self, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare the captions `rows` (R,) with the other captions of the photos of `places` (R,).

        Returns the product with the nearest (R,), the mean cosine of the weights of terms (R,), both 0 without others,
        and which terms another one has (R, L) bool.
        """
        terms, weights, owner = self.captions.terms, self.captions.weights, self.captions.owner[places]
        nearest, agreement = torch.zeros(2, len(rows), device=rows.device)
        shared = torch.zeros_like(terms[rows], dtype=torch.bool)
        for number in range(int(self.captions.count.max())):
            is_sibling = (number < self.captions.count[owner]) & (self.captions.first[owner] + number != places)
            pairs = is_sibling.nonzero().flatten()
            for chunk in pairs.split(CHUNK):
                row, sibling = rows[chunk], self.captions.first[owner[chunk]] + number
                nearest[chunk] = torch.maximum(nearest[chunk], (self.texts[row] * self.texts[sibling]).sum(1))
                common = (terms[row][:, :, None] == terms[sibling][:, None]).any(2)
                shared[chunk] |= common
                norms = weights[terms[row]].norm(dim=1) * weights[terms[sibling]].norm(dim=1)
                agreement[chunk] += (weights[terms[row]].square() * common).sum(1) / norms.clamp_min(1e-6)
        return nearest, agreement / (self.captions.count[owner] - 1).clamp_min(1), shared

    def _compare_with_neighbours(self, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Compare the captions `rows` (R,) with those of the photos most like the photos of `places` (R,).

        Alike are photos whose context fits this one's, without the caption. Returns the log of how much more often than
        anywhere the caption's terms are among the neighbours', summed over its terms (R,), and which are (R, L) bool.
        """
        captions = self.captions
        expected, known = [], []
        for row, place in zip(rows.split(CHUNK), places.split(CHUNK), strict=True):
            scores = self.without[place] @ self.full.T  # (B, N)
            scores.scatter_(1, captions.owner[place][:, None], float("-inf"))  # neither the photo itself
            scores.scatter_(1, captions.owner[row][:, None], float("-inf"))  # nor the caption's own
            neighbours = scores.topk(min(NEIGHBOURS, scores.shape[1] - 2), dim=1).indices  # (B, K)
            terms = captions.terms[row]  # (B, L)
            found = self._count_terms(neighbours).gather(1, terms)
            total = captions.count[neighbours].sum(1, keepdim=True)
            usual = self.frequency[terms]
            ratio = (found / usual.clamp_min(1e-9) + PRIOR_CAPTIONS) / (total + PRIOR_CAPTIONS)
            expected.append((ratio.log() * (terms > 0)).sum(1))
            known.append((found > 0) & (terms > 0))
        return torch.cat(expected), torch.cat(known)

    def _count_terms(self, photos: Tensor) -> Tensor:
        """How many captions of some photos (B, K) have each term: (B, V) float32."""
        captions = self.captions
        counts = torch.zeros(len(photos), len(captions.weights), device=photos.device)
        for number in range(int(captions.count.max())):
            exists = number < captions.count[photos]
            terms = captions.terms[(captions.first[photos] + number) * exists] * exists[:, :, None]  # (B, K, L)
            counts.scatter_add_(1, terms.flatten(1), torch.ones_like(terms, dtype=counts.dtype).flatten(1))
        return counts


def _vectors_of(model: MatchingModel, captions: CaptionTerms, features: Tensor) -> tuple[Tensor, ...]:
    """What `_Measure` has of one model: texts, scaled vectors, full, photo, without and siblings."""
    owner, count = captions.owner, captions.count[:, None]
    texts = torch.cat([model.embed_terms(terms, captions.weights) for terms in captions.terms.split(4_096)])
    total = torch.zeros(len(features), texts.shape[1], device=features.device).index_add(0, owner, texts)
    others = model.siblings((total[owner] - texts) / (count[owner] - 1).clamp_min(1))
    projected = model.photo(features)
    return (
        texts,
        model.scale * model.embed_captions(texts),
        model.embed_contexts(projected, model.siblings(total / count)),
        model.embed_contexts(projected, 0.0),
        model.embed_contexts(projected[owner], others),
        model.embed_contexts(0.0, others),
    )


def train_classifier(real: Tensor, counterfeit: Tensor) -> nn.Module:
    """A network from evidence (R, E) to the log-odds (R,) that a caption is a counterfeit, trained on both kinds."""
    evidence = torch.cat([real, counterfeit])
    targets = torch.cat([torch.zeros(len(real)), torch.ones(len(counterfeit))]).to(evidence.device)
    normalise = nn.BatchNorm1d(evidence.shape[1], affine=False, momentum=None).to(evidence.device)
    normalise(evidence)  # takes its statistics
    network = nn.Sequential(
        normalise.eval(),
        nn.Linear(evidence.shape[1], CLASSIFIER_UNITS),
        nn.ReLU(),
        nn.Linear(CLASSIFIER_UNITS, 1),
        nn.Flatten(0),
    ).to(evidence.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(CLASSIFIER_STEPS):
        batch = torch.randint(len(evidence), (512,), device=evidence.device)
        loss = F.binary_cross_entropy_with_logits(network(evidence[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False)
