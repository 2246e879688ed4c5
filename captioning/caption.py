"""A caption, as the search returns it in word ids and as everybody else shows it in words.

Letters: T words, P cells (14 x 14 = 196).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from captioning.encoders.grid import SIDE


@dataclass
class Caption:
    """What beam search and sampling return."""

    words: list[int]  # ids, without <start> and <end>
    log_probability: float  # natural logarithm, summed over the words, and <end> if it is finished
    finished: bool  # False: no hypothesis ended within max_length words, and this is the most likely one
    attention: Tensor | None  # (T, P) float32 on the CPU, one row per word; None for a decoder without attention


@dataclass
class CaptionResult:
    """A photo's caption in words. What a captions file does not tell is None."""

    text: str
    words: list[str]
    log_probability: float | None = None  # natural logarithm, of the whole caption
    finished: bool | None = None  # False: cut at max_length
    attention: Tensor | None = None  # (T, P), one row per word; None for a decoder without attention
    # (T,): the share of each word that came from language alone (beta, Lu et al. 2017); None without a sentinel
    sentinel: list[float] | None = None
    others: list[CaptionResult] = field(default_factory=list)  # further captions of the photo, best first
    grid: tuple[int, int] = (SIDE, SIDE)  # rows and columns of the attention
