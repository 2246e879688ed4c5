"""Photos that are nearly the same: found by their cached features, confirmed by their pixels.

Features find the few photos that are alike, but those of two dogs on grass are nearly as near as those of a photo and
its copy. Grey thumbnails tell these apart, but not two empty beaches. So the similarity of two photos is the product of
both: the cosine of their features and the correlation of their thumbnails.

Letters: N photos, B of a chunk, C channels, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from captioning.doctor.findings import Check, Finding, worst_first
from captioning.encoders.images import open_photo
from captioning.errors import PhotoError, UserError
from captioning.runtime.progress import tqdm
from preprocess.captions import Photo

NEIGHBOURS = 5  # of each photo whose pixels are compared
MIN_SIMILARITY = 0.7  # copies have more than 0.8, other scenes at most 0.7: see docs/data.md
THUMBNAIL = 32  # pixels per side that are compared
CHUNK = 2_048  # photos


def check_near_duplicates(photos: Sequence[Photo], pooled: Tensor) -> Check:
    """The check. pooled: (N, C) float32, the mean feature of each photo, on the device that computes.

    Score: the similarity, plus 1 for photos in different splits. A photo that cannot be read has no duplicates; one
    line counts those. Raises UserError if none can be read.
    """
    pairs = nearest_pairs(pooled)
    thumbnails = read_thumbnails(photos, sorted({index for pair in pairs for index in pair}))
    findings = []
    for (one, other), cosine in pairs.items():
        if one not in thumbnails or other not in thumbnails:
            continue
        similarity = cosine * float(thumbnails[one] @ thumbnails[other])
        if similarity >= MIN_SIMILARITY:
            pair = photos[one], photos[other]
            crosses = pair[0].split != pair[1].split
            note = f"{pair[0].split} and {pair[1].split}; similarity {similarity:.3f}"
            findings.append(Finding(similarity + crosses, note, pair))
    return Check(
        "near_duplicates",
        "Near-duplicate photos",
        "A photo twice: saved anew, resized, or taken a moment later. Pairs in different splits come first: they make "
        "scores of val and test too high.",
        worst_first(findings),
    )


def nearest_pairs(pooled: Tensor) -> dict[tuple[int, int], float]:
    """Pairs (i, j), i < j, of which one is among the NEIGHBOURS nearest to the other, and the cosine of their features.

    pooled: (N, C) float32. Cosines below MIN_SIMILARITY are left out.
    """
    unit = F.normalize(pooled, dim=1)
    count = min(NEIGHBOURS, len(unit) - 1)
    pairs = {}
    for start in range(0, len(unit), CHUNK):
        cosine = unit[start : start + CHUNK] @ unit.T  # (B, N)
        cosine.diagonal(start).fill_(-1)  # a photo is not its own duplicate
        values, neighbours = cosine.topk(count, dim=1)  # (B, K)
        for row, column in (values >= MIN_SIMILARITY).nonzero().tolist():
            pair = (start + row, int(neighbours[row, column]))
            pairs[min(pair), max(pair)] = float(values[row, column])
    return pairs


def read_thumbnails(photos: Sequence[Photo], indices: Sequence[int]) -> dict[int, np.ndarray]:
    """The grey thumbnails of these photos, those that can be read: photo -> (THUMBNAIL^2,) float32.

    Their mean is 0 and their norm 1, so a product is a correlation. Raises UserError if no photo can be read.
    """
    thumbnails, failures = {}, []
    for index in tqdm(indices, "comparing photos", unit=" photos"):
        try:
            photo = open_photo(photos[index].image, 4 * THUMBNAIL)
        except PhotoError as error:
            failures.append(str(error))
            continue
        pixels = np.asarray(photo.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), np.float32).ravel()
        pixels -= pixels.mean()
        thumbnails[index] = pixels / max(float(np.linalg.norm(pixels)), 1e-6)
    if failures and not thumbnails:
        raise UserError(f"{failures[0]}; no photo can be read: check the paths in captions.jsonl")
    if failures:
        print(f"near-duplicates: {len(failures):,} of {len(indices):,} photos cannot be read, such as {failures[0]}")
    return thumbnails
