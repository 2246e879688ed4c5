"""Captions: word ids as a search returns them, and words as every command shows them.

Letters: T words, P cells (14 x 14 = 196).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from captioning.encoders.grid import GRID_SIZE


@dataclass
class Caption:
    """A caption as beam search and sampling return it."""

    words: list[int]  # ids, without <start> and <end>
    log_probability: float  # natural logarithm, summed over the words and, if finished, <end>
    finished: bool  # False: no hypothesis ended within max_length words, and this is the most probable one
    attention: Tensor | None  # (T, P) float32 on the CPU, one row per word; None for a decoder without attention


@dataclass
class CaptionResult:
    """A photo's caption in words. A field that a captions file does not contain is None."""

    text: str
    words: list[str]
    log_probability: float | None = None  # natural logarithm, of the whole caption
    finished: bool | None = None  # False: truncated at max_length
    attention: Tensor | None = None  # (T, P), one row per word; None for a decoder without attention
    # (T,) the sentinel gate beta: the weight of the language model, rather than the photo, in each word; None for a
    # decoder without a sentinel (Lu et al. 2017, https://arxiv.org/abs/1612.01887, eq. 10-13)
    sentinel: list[float] | None = None
    # that the caption is as close to people's captions as people's are to each other; None without a calibrated run
    probability: float | None = None
    # (T,) of each word, in nats: above 0 it is likelier before this photo than before the mean photo; None without a
    # calibrated run (captioning/evaluation/candidates.py)
    evidence: list[float] | None = None
    others: list[CaptionResult] = field(default_factory=list)  # further captions of the photo, best first
    grid: tuple[int, int] = (GRID_SIZE, GRID_SIZE)  # rows and columns of the attention
