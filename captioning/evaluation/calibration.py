"""The probability that a caption is good: how it is predicted, and how well.

A caption is good if its CIDEr-D with people's captions reaches a threshold: by default the median of the CIDEr-D of
people's captions with the other captions of their photo. Logistic regression predicts that from the features of
`captioning.evaluation.candidates`, on validation photos. Every figure about the result comes from cross-fitting: two
halves of the photos, each predicted by the models of the other.

    calibration error   the mean difference of predicted and observed frequency over tenths of the captions, ordered by
                        probability (Naeini et al. 2015, https://doi.org/10.1609/aaai.v29i1.9602, with equal numbers)
    risk and coverage   the mean score of the captions above a probability, and their fraction (El-Yaniv and Wiener
                        2010, https://jmlr.org/papers/v11/el-yaniv10a.html)

Letters: N photos, K captions of a photo, F features, G groups, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captioning.evaluation.candidates import Candidates, feature_names
from captioning.evaluation.consensus import NGramWeights
from captioning.evaluation.logistic import LogisticModel
from captioning.evaluation.metrics import NUM_RESAMPLES, confidence_interval
from captioning.runtime.settings import flag
from captioning.search.options import CHOICES, SearchOptions

GROUPS = 10  # of captions, ordered by probability, of equal size
ANY_VALUE = ("num_captions", "choose")  # settings of a search that do not change what its best caption is worth


class HeldOut(NamedTuple):
    """Captions of photos that the models have not seen."""

    probability: np.ndarray  # (N,) float64, predicted
    good: np.ndarray  # (N,) bool
    cider: np.ndarray  # (N,) float64: CIDEr-D, 0 to 10


@dataclass(frozen=True)
class Calibration:
    """What a checkpoint holds to judge its captions."""

    search: dict  # SearchOptions as plain data, with which the captions were made
    views: int  # of each photo
    threshold: float  # CIDEr-D, 0 to 10, from which a caption is good
    ranker: LogisticModel  # fitted on all candidates: --choose probability takes the highest
    models: dict[str, LogisticModel]  # of each choice, fitted on the captions that it chose
    held_out: dict[str, HeldOut]  # of each choice, by cross-fitting
    mean_photo: Tensor  # (h, w, C) float32: the mean features of training photos
    weights: NGramWeights  # of the captions of train

    def to_dict(self) -> dict:
        """Tensors and plain data, for a checkpoint."""
        return {
            "search": self.search,
            "views": self.views,
            "threshold": self.threshold,
            "ranker": self.ranker.to_dict(),
            "models": {choice: model.to_dict() for choice, model in self.models.items()},
            "held_out": {
                choice: {name: torch.from_numpy(values) for name, values in held_out._asdict().items()}
                for choice, held_out in self.held_out.items()
            },
            "mean_photo": self.mean_photo,
            "weights": self.weights.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: dict) -> Calibration:
        """The inverse of `to_dict`. Raises an error of `checkpoint_errors` if a part is missing or malformed."""
        return cls(
            dict(data["search"]),
            int(data["views"]),
            float(data["threshold"]),
            LogisticModel.from_dict(data["ranker"]),
            {choice: LogisticModel.from_dict(data["models"][choice]) for choice in CHOICES},
            {
                choice: HeldOut(*(data["held_out"][choice][name].numpy() for name in HeldOut._fields))
                for choice in CHOICES
            },
            data["mean_photo"].float(),
            NGramWeights.from_dict(data["weights"]),
        )

    def order(self, candidates: Candidates, features: np.ndarray, choice: str) -> list[int]:
        """The captions of a photo, best first: indices of the candidates."""
        return order_candidates(candidates, features, choice, self.ranker)

    def differences(self, search: SearchOptions, views: int) -> list[str]:
        """The flags with which the captions were made that were calibrated, where those of a search are others."""
        now = {**vars(search), "views": views}
        then = {**vars(SearchOptions()), **self.search, "views": self.views}
        return [f"{flag(name)} {then[name]}" for name in now if name not in ANY_VALUE and now[name] != then[name]]


def order_candidates(candidates: Candidates, features: np.ndarray, choice: str, ranker: LogisticModel) -> list[int]:
    """The captions of a photo, best first, as indices. features: (K, F). ranker: for the choice probability alone."""
    if choice == "log-probability":
        return list(range(candidates.num_found))
    if choice == "consensus":
        values = candidates.expected_agreement()
    else:
        values = ranker.predict(features)
    return np.argsort(-values, kind="stable").tolist()


class Examples(NamedTuple):
    """Validation photos with their candidates, and how good these are."""

    candidates: Sequence[Candidates]  # N
    features: Sequence[np.ndarray]  # (K, F) of each photo
    ciders: Sequence[np.ndarray]  # (K,) of each photo: CIDEr-D with people's captions, 0 to 10

    @classmethod
    def of(cls, candidates: Sequence[Candidates], ciders: Sequence[np.ndarray]) -> Examples:
        """With the features of the candidates."""
        return cls(candidates, [photo.features() for photo in candidates], ciders)

    def subset(self, photos: np.ndarray) -> Examples:
        """Those of these photos."""
        return Examples(*([values[photo] for photo in photos] for values in self))

    def chosen(self, choice: str, ranker: LogisticModel) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, F) and CIDEr-D (N,) of the caption that is chosen for each photo."""
        best = [
            order_candidates(candidates, features, choice, ranker)[0]
            for candidates, features in zip(self.candidates, self.features, strict=True)
        ]
        features = np.stack([features[index] for features, index in zip(self.features, best, strict=True)])
        return features, np.array([ciders[index] for ciders, index in zip(self.ciders, best, strict=True)])


def fit_models(examples: Examples, threshold: float) -> tuple[LogisticModel, dict[str, LogisticModel]]:
    """The ranker and the model of each choice."""
    goods = np.concatenate(examples.ciders) >= threshold
    ranker = LogisticModel.fit(np.concatenate(examples.features), goods)
    models = {}
    for choice in CHOICES:
        features, ciders = examples.chosen(choice, ranker)
        models[choice] = LogisticModel.fit(features, ciders >= threshold)
    return ranker, models


def cross_fit(examples: Examples, threshold: float) -> dict[str, HeldOut]:
    """Predict each half of the photos, drawn at random, by the models of the other half."""
    order = np.random.default_rng(0).permutation(len(examples.candidates))
    halves = np.array_split(order, 2)
    parts: dict[str, list[HeldOut]] = {choice: [] for choice in CHOICES}
    for fitted, predicted in (halves, halves[::-1]):
        ranker, models = fit_models(examples.subset(fitted), threshold)
        for choice, model in models.items():
            features, ciders = examples.subset(predicted).chosen(choice, ranker)
            parts[choice].append(HeldOut(model.predict(features), ciders >= threshold, ciders))
    back = np.argsort(np.concatenate(halves[::-1]))  # to the order of the photos
    return {
        choice: HeldOut(*(np.concatenate(values)[back] for values in zip(*of_halves, strict=True)))
        for choice, of_halves in parts.items()
    }


# ---- how well


class Reliability(NamedTuple):
    """Groups of captions of equal size, by ascending probability."""

    predicted: np.ndarray  # (G,) mean probability
    observed: np.ndarray  # (G,) fraction of good captions
    interval: np.ndarray  # (2, G) of `observed`, 95 %


def reliability(held_out: HeldOut, groups: int = GROUPS) -> Reliability:
    """Predicted and observed frequency of good captions in groups; Wilson's interval (1927)."""
    parts = _groups(held_out.probability, groups)
    predicted = np.array([held_out.probability[part].mean() for part in parts])
    observed = np.array([held_out.good[part].mean() for part in parts])
    count = np.array([len(part) for part in parts])
    z2 = 1.96**2
    centre = (observed + z2 / (2 * count)) / (1 + z2 / count)
    radius = 1.96 * np.sqrt(observed * (1 - observed) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Reliability(predicted, observed, np.stack([centre - radius, centre + radius]))


def calibration_error(probability: np.ndarray, good: np.ndarray, groups: int = GROUPS) -> np.ndarray:
    """The expected calibration error: the mean over groups of |predicted - observed frequency|, by their sizes.

    probability (N,); good (..., N) bool. Returns (...) float64.
    """
    parts = _groups(probability, groups)
    errors = [len(part) * np.abs(good[..., part].mean(-1) - probability[part].mean()) for part in parts]
    return np.sum(errors, 0) / len(probability)


def _groups(probability: np.ndarray, groups: int) -> list[np.ndarray]:
    """Indices of the captions of each group, by ascending probability."""
    return np.array_split(np.argsort(probability, kind="stable"), min(groups, len(probability)))


def perfect_calibration_error(probability: np.ndarray) -> float:
    """The mean calibration error if the probabilities were right: so much is chance. See `calibration_error`."""
    draws = np.random.default_rng(0).random((NUM_RESAMPLES // 5, len(probability))) < probability
    return float(calibration_error(probability, draws).mean())


def risk_coverage(held_out: HeldOut, coverages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean CIDEr-D of the most probable captions: (G,) and its 95 % interval (2, G), by bootstrap of the photos.

    coverages (G,): fractions of the photos.
    """
    rng = np.random.default_rng(0)
    photos = len(held_out.cider)
    values = _best_means(held_out, coverages)
    resamples = []
    for _ in range(NUM_RESAMPLES):
        drawn = rng.integers(photos, size=photos)
        resamples.append(_best_means(HeldOut(*(part[drawn] for part in held_out)), coverages))
    return values, confidence_interval(np.array(resamples)).T


def _best_means(held_out: HeldOut, coverages: np.ndarray) -> np.ndarray:
    """(G,): the mean CIDEr-D of each fraction of the captions, the most probable ones first."""
    means = held_out.cider[np.argsort(-held_out.probability, kind="stable")].cumsum()
    means = means / np.arange(1, len(means) + 1)
    return means[np.maximum(1, np.round(coverages * len(means)).astype(int)) - 1]


def paired_gain(held_out: HeldOut, baseline: HeldOut) -> tuple[float, np.ndarray]:
    """The mean gain in CIDEr-D over other captions of the same photos, and its 95 % interval (2,), by bootstrap."""
    gain = held_out.cider - baseline.cider
    drawn = np.random.default_rng(0).integers(len(gain), size=(NUM_RESAMPLES, len(gain)))
    return float(gain.mean()), confidence_interval(gain[drawn].mean(1))


def describe(calibration: Calibration) -> str:
    """What a table says about captions of photos that the models have not seen."""
    baseline = calibration.held_out[CHOICES[0]]
    names = ("", "CIDEr-D", "gain (95 %)", "good", "error", "by chance", "best fifth")
    lines = ["{:<16} {:>8} {:>20} {:>7} {:>7} {:>9} {:>24}".format(*names)]
    for choice, held_out in calibration.held_out.items():
        gain, (low, high) = paired_gain(held_out, baseline)
        (best, mean), interval = risk_coverage(held_out, np.array([0.2, 1.0]))
        lines.append(
            f"{choice:<16} {100 * mean:>8.1f} {f'{100 * gain:+.1f} ({100 * low:+.1f}..{100 * high:+.1f})':>20} "
            f"{held_out.good.mean():>7.1%} {calibration_error(held_out.probability, held_out.good):>7.1%} "
            f"{perfect_calibration_error(held_out.probability):>9.1%} "
            f"{f'{100 * best:.1f} ({100 * interval[0, 0]:.1f}..{100 * interval[1, 0]:.1f})':>24}"
        )
    return "\n".join(lines)


def describe_model(calibration: Calibration) -> str:
    """The weight of each feature, per standard deviation, in the probability of the best caption of a search."""
    names = feature_names(calibration.search["samples"], calibration.views)
    weights = calibration.models[CHOICES[0]].weights
    return ", ".join(f"{name} {weight:+.2f}" for name, weight in zip(names, weights, strict=True))
