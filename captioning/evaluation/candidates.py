"""The captions that a search finds for a photo, and what tells how far to trust each of them.

Evidence of a word: log p(word | photo, words before) - log p(word | mean photo, words before). The mean photo has the
mean features of training photos, so it shows nothing in particular: a word that is as likely there comes from habit,
and one that is likelier before this photo comes from the photo. Li et al. 2016, https://aclanthology.org/N16-1014/,
subtract the log-probability without the input for the same reason.

Letters: B photos, K captions of a photo, t words of a caption, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from captioning.caption import Caption
from captioning.decoders.ensemble import PhotoViews
from captioning.decoders.protocol import Decoder
from captioning.encoders.grid import Grid, grid_pooling
from captioning.evaluation.consensus import NGramWeights, mean_with_others
from captioning.search.beam_search import beam_search
from captioning.search.forced import forced_log_probabilities
from captioning.search.graphs import DecodingGraphs
from captioning.search.options import SearchOptions
from captioning.search.sampling import sample_captions

FEATURES = ("log-probability", "lowest word", "evidence", "margin", "agreement", "words", "rarity")
SAMPLE_FEATURES = ("agreement with samples", "agreement of samples")  # with SearchOptions.samples
VIEW_FEATURES = ("disagreement of views",)  # with several views of a photo


@dataclass(frozen=True)
class Candidates:
    """The captions of one photo, among which one is chosen."""

    captions: list[Caption]  # those of the search, best first, then sampled ones
    num_found: int  # by the search; the rest were sampled
    log_probabilities: list[np.ndarray]  # (t + 1,) float32 each: of the words and of <end>
    evidence: list[np.ndarray]  # (t + 1,) float32 each
    agreement: np.ndarray  # (K, K) float64: see `NGramWeights.agreement`
    rarity: np.ndarray  # (K,) float64: mean of log(photos / photos whose captions have the word)
    view_spread: np.ndarray | None = None  # (K,) standard deviation over the views of log p per word

    def features(self) -> np.ndarray:
        """What the probability of each caption is predicted from: (K, F) float64, named by `feature_names`."""
        totals = np.array([values.sum() for values in self.log_probabilities], float)
        columns = [
            np.array([values.mean() for values in self.log_probabilities], float),
            np.array([values.min() for values in self.log_probabilities], float),
            np.array([values.mean() for values in self.evidence], float),
            self._margins(totals),
            self._agreement_with(range(self.num_found)),
            np.array([len(caption.words) for caption in self.captions], float),
            self.rarity,
        ]
        if len(self.captions) > self.num_found:
            sampled = range(self.num_found, len(self.captions))
            among = mean_with_others(self.agreement[self.num_found :, self.num_found :]).mean()
            columns += [self._agreement_with(sampled), np.full(len(totals), among)]
        if self.view_spread is not None:
            columns.append(self.view_spread)
        return np.column_stack(columns)

    def expected_agreement(self) -> np.ndarray:
        """The CIDEr-D that each caption is expected to have, (K,), if a person says one of these with its probability.

        The gain of minimum Bayes risk over an n-best list (Kumar and Byrne 2004, https://aclanthology.org/N04-1022/).
        """
        distinct = self.distinct(range(len(self.captions)))
        totals = np.array([self.log_probabilities[index].sum() for index in distinct], float)
        weights = np.exp(totals - totals.max())
        return self.agreement[:, distinct] @ weights / weights.sum()

    def distinct(self, order: Iterable[int]) -> list[int]:
        """Those of these captions, by index, that are the first with their words: a sampled one may repeat another."""
        first_with: dict[tuple[int, ...], int] = {}
        for index in order:
            first_with.setdefault(tuple(self.captions[index].words), index)
        return list(first_with.values())

    def _margins(self, totals: np.ndarray) -> np.ndarray:
        """log p of each caption (K,) minus that of the most probable other one of the search; 0 without another."""
        margins = np.zeros(len(totals))
        for index, total in enumerate(totals):
            others = np.delete(totals[: self.num_found], index) if index < self.num_found else totals[: self.num_found]
            margins[index] = total - others.max() if len(others) else 0.0
        return margins

    def _agreement_with(self, group: range) -> np.ndarray:
        """The mean CIDEr-D of each caption with the others of a group: (K,); 0 without another."""
        values = self.agreement[:, group]
        own = np.isin(np.arange(len(values)), group)  # a caption's CIDEr-D with itself does not count
        sums = values.sum(1) - np.where(own, np.diag(self.agreement), 0.0)
        return sums / np.maximum(1, len(group) - own)


def feature_names(samples: int, views: int) -> tuple[str, ...]:
    """The names of the features. samples: captions sampled per photo; views: of a photo."""
    return FEATURES + SAMPLE_FEATURES * (samples > 0) + VIEW_FEATURES * (views > 1)


def mean_grid(mean_photo: Tensor, device: torch.device, dtype: torch.dtype) -> Grid:
    """The mean photo as a batch of one. mean_photo: (h, w, C) float32."""
    height, width, channels = mean_photo.shape
    return Grid(mean_photo.reshape(1, -1, channels), grid_pooling(height, width)).to(device, dtype)


def find_candidates(
    decoder: Decoder,
    grid: Grid | PhotoViews,
    search: SearchOptions,
    whole_decoder: Decoder,
    mean_photo: Grid,
    weights: NGramWeights,
    graphs: DecodingGraphs | None = None,
) -> list[Candidates]:
    """Search, or sample, captions of each photo, and measure them.

    decoder: reads `grid`, the photos or several views of them; whole_decoder: reads one Grid; both in eval mode.
    mean_photo: from `mean_grid`. The captions of a beam search are as many as its beam is wide, those of diverse beam
    search and of sampling as many as wanted.
    """
    photos = cast(Grid, grid)  # a search takes views like a Grid
    found = _search(decoder, photos, search, graphs)
    sampled: list[list[Caption]] = [[] for _ in found]
    if search.samples:
        options = SearchOptions(
            temperature=1.0,
            num_captions=search.samples,
            max_length=search.max_length,
            allow_unknown=search.allow_unknown,
        )
        sampled = sample_captions(decoder, photos, options, graphs)
    pools = [[*first, *second] for first, second in zip(found, sampled, strict=True)]
    words = [[caption.words for caption in pool] for pool in pools]
    log_probabilities = forced_log_probabilities(decoder, photos, words)
    evidence = evidence_of_words(log_probabilities, whole_decoder, mean_photo, words)
    agreement = weights.agreement(words)
    spreads = _view_spreads(whole_decoder, grid, words)
    return [
        Candidates(
            pools[photo],
            len(found[photo]),
            log_probabilities[photo],
            evidence[photo],
            agreement[photo],
            np.array([weights.rarity(caption).mean() if caption else 0.0 for caption in words[photo]]),
            spreads[photo],
        )
        for photo in range(len(pools))
    ]


def evidence_of_words(
    log_probabilities: Sequence[Sequence[np.ndarray]],
    decoder: Decoder,
    mean_photo: Grid,
    words: Sequence[Sequence[Sequence[int]]],
) -> list[list[np.ndarray]]:
    """The evidence of every word of the captions of each photo, and of <end>: (t + 1,) float32 for each caption.

    log_probabilities: of these words before the photos, from `forced_log_probabilities`. mean_photo: of `mean_grid`.
    """
    from_habit = forced_log_probabilities(decoder, mean_photo, words)
    return [
        [with_photo - without for with_photo, without in zip(*of_photo, strict=True)]
        for of_photo in zip(log_probabilities, from_habit, strict=True)
    ]


def _search(decoder: Decoder, grid: Grid, search: SearchOptions, graphs: DecodingGraphs | None) -> list[list[Caption]]:
    if search.temperature:
        return sample_captions(decoder, grid, search, graphs)
    if search.beam_groups == 1:  # the best of a beam does not depend on how many of its captions are wanted
        search = replace(search, num_captions=search.beam_size)
    return beam_search(decoder, grid, search, graphs)


def _view_spreads(
    decoder: Decoder, grid: Grid | PhotoViews, words: list[list[list[int]]]
) -> Sequence[np.ndarray | None]:
    """The standard deviation over the views of log p per word, (K,) for each photo; None for whole photos."""
    if not isinstance(grid, PhotoViews):
        return [None] * len(words)
    of_views = [forced_log_probabilities(decoder, view, words) for view in grid.grids]
    return [
        np.std([[values.mean() for values in of_view[photo]] for of_view in of_views], axis=0)
        for photo in range(len(words))
    ]
