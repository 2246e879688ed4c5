"""The log-probability of the words of given captions, by any decoder: forced decoding.

Letters: B photos, K captions per photo, R = B K captions, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from captioning.decoders.protocol import Decoder
from captioning.encoders.grid import Grid
from captioning.search.end_check import copy_to_cpu
from preprocess.vocabulary import END, PAD, START


@torch.no_grad()
def forced_log_probabilities(
    decoder: Decoder, grid: Grid, captions: Sequence[Sequence[Sequence[int]]]
) -> list[list[np.ndarray]]:
    """log p(word | photo, words before) of every word of given captions, and of the <end> after them.

    captions: those of each photo as word ids, without <start> and <end>; photos may have different numbers of them.
    grid: the B photos in this order, or one photo, to which all captions are compared. Returns for each caption of t
    words (t + 1,) float32, natural logarithms. The decoder should be in eval mode. Reads from the device once.
    """
    targets = _pad(captions).to(grid.cells.device)  # (B, K, T)
    per_photo = targets.shape[1] if len(grid) == len(targets) else len(targets) * targets.shape[1]
    targets = targets.flatten(0, 1)  # (R, T)
    photos = torch.arange(len(grid), device=targets.device).repeat_interleave(per_photo)
    state = decoder.init_state(grid).reorder(photos)
    words = torch.full_like(targets[:, 0], START)
    log_probabilities = []
    for next_words in targets.unbind(1):
        step = decoder.step(words, state)
        state = step.state
        log_probabilities.append(step.log_probabilities.gather(1, next_words[:, None])[:, 0])
        words = next_words
    (copied,) = copy_to_cpu(torch.stack(log_probabilities, 1))
    assert copied is not None
    rows = copied.float().numpy().reshape(len(captions), -1, targets.shape[1])
    return [
        [row[: len(caption) + 1] for row, caption in zip(photo_rows, photo_captions, strict=False)]
        for photo_rows, photo_captions in zip(rows, captions, strict=True)
    ]


def _pad(captions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Word ids, <end>, then <pad>: (B, K, T) int64, on the CPU. Missing captions are <pad> alone."""
    count = max(len(photo_captions) for photo_captions in captions)
    length = 1 + max(len(caption) for photo_captions in captions for caption in photo_captions)
    padded = torch.full((len(captions), count, length), PAD)
    for rows, photo_captions in zip(padded, captions, strict=True):
        for row, caption in zip(rows, photo_captions, strict=False):
            row[: len(caption) + 1] = torch.tensor([*caption, END])
    return padded
