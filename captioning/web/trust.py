"""What a page needs to judge its captions as `Captioner` does: the mean photo, and the model of a calibration.

trust.bin holds numbers of 4 bytes, little-endian, one array after another:

    mean photo    (N, C) float32, its cells

and where captions get a probability, for the n-grams of each order, 1 to 4, that CIDEr-D knows, in ascending order:

    beginnings    (D,) uint32, the number of the n-gram without its last word: its place in the order before
    last words    (D,) uint32, word ids
    weights       (D + 1,) float32; the last one is for n-grams that are not listed

Letters: N native cells, C channels, D n-grams of one order, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioning.caption import CaptionResult
from captioning.captioner import DEFAULT_SEARCH, Captioner
from captioning.encoders.grid import grid_pooling
from captioning.evaluation.calibration import Calibration
from captioning.evaluation.consensus import NGramWeights
from captioning.evaluation.ngrams import LAST_WORD, WORD_BITS
from captioning.web.onnx_decoder import OnnxModels

FILE = "model/trust.bin"


def trust_of(captioner: Captioner, num_cells: int) -> tuple[dict[str, Any], bytes] | None:
    """What description.json says about trust, and the content of trust.bin; None if the run is not calibrated.

    num_cells: those that the decoder reads. Prints what the page will not show, and why.
    """
    calibration = captioner.calibration
    obstacle = captioner.probability_obstacle(DEFAULT_SEARCH)
    if calibration is None:
        print(f"the page shows no probability and no evidence: {obstacle}; see python -m captioning.calibrate")
        return None
    cells = mean_cells(calibration, num_cells)[0].numpy()
    description: dict[str, Any] = {"file": FILE, "mean_photo": list(cells.shape)}
    arrays = [cells.astype("<f4")]
    if obstacle is None:
        description |= {"probability": _describe_probability(calibration)}
        arrays += _ngram_arrays(calibration.weights)
    else:
        print(f"the page shows no probability: {obstacle}")
    return description, b"".join(array.tobytes() for array in arrays)


def compare_probabilities(
    models: OnnxModels, photos: Tensor, captioner: Captioner, expected: Sequence[CaptionResult]
) -> str:
    """How far the probabilities of a page are from those of the run.

    photos: (B, 3, S, S) uint8; expected: what the run, which is calibrated, says of them.
    """
    calibration = captioner.calibration
    assert calibration is not None
    mean_photo = mean_cells(calibration, num_cells=models.pooling.shape[-1])
    candidates = models.find_candidates(photos, DEFAULT_SEARCH, mean_photo, calibration.weights)
    model = calibration.models[DEFAULT_SEARCH.choose]
    actual = np.array([model.predict(found.features()[0]) for found in candidates])
    differences = np.abs(actual - [result.probability for result in expected])
    return f"their probabilities differ by {differences.mean():.3f} (mean; largest {differences.max():.3f})"


def mean_cells(calibration: Calibration, num_cells: int) -> Tensor:
    """The cells of the mean photo (1, N, C): if only their mean is known, N times that, which has the same mean.

    If only the 14x14 output cells are known, from a feature file of these, native cells of which they are the pooling.
    """
    cells = calibration.mean_photo.flatten(0, 1)
    if len(cells) not in (1, num_cells):
        side = round(num_cells**0.5)  # photos are resized to squares
        cells = (torch.linalg.pinv(grid_pooling(side, side).double()) @ cells.double()).float()
    return cells.expand(num_cells, -1)[None].contiguous()


def describe_good(calibration: Calibration) -> float:
    """The CIDEr-D, times 100, from which a caption counts as good, as the page shows it."""
    return round(100 * calibration.threshold, 1)


def _describe_probability(calibration: Calibration) -> dict[str, Any]:
    """The model of the best caption of a search, its F features in the order of `candidates.FEATURES`."""
    return {
        "good": describe_good(calibration),
        "model": calibration.models[DEFAULT_SEARCH.choose].to_dict(),
        "ngrams": [len(known.codes) - 1 for known in calibration.weights.known],  # without the end mark
    }


def _ngram_arrays(weights: NGramWeights) -> list[np.ndarray]:
    arrays = []
    for known in weights.known:
        codes = known.codes[:-1]
        arrays += [(codes >> WORD_BITS).astype("<u4"), (codes & LAST_WORD).astype("<u4")]
        arrays.append(known.inverse_frequencies.astype("<f4"))
    return arrays
