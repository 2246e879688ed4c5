"""Statistics of the preprocessed captions, collected while they are written, and the summary that is printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from preprocess.captions import Photo
from preprocess.folders import SPLITS
from preprocess.vocabulary import SPECIAL, Vocabulary

HEADINGS = ("split", "photos", "captions", "words: median", "90 %", "99 %", "max", "unknown")
QUANTILES = (0.5, 0.9, 0.99, 1)  # of the caption lengths, in the order of the headings


@dataclass
class SplitStats:
    """The statistics of one split."""

    photos: int = 0
    words: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # words per caption -> number of captions

    @property
    def captions(self) -> int:
        """Number of captions."""
        return self.lengths.total()

    def add(self, photo: Photo) -> None:
        """Count a photo and its captions."""
        self.photos += 1
        self.lengths.update(map(len, photo.captions))
        for words in photo.captions:
            self.words.update(words)

    def length_quantile(self, fraction: float) -> int:
        """The smallest length that at least this fraction of the captions does not exceed (nearest rank)."""
        wanted = fraction * self.captions
        covered = 0
        for length, captions in sorted(self.lengths.items()):
            covered += captions
            if covered >= wanted:
                return length
        return 0

    @property
    def mean_letters(self) -> float:
        """Letters per word."""
        return sum(len(word) * count for word, count in self.words.items()) / max(self.words.total(), 1)

    def unknown_fraction(self, vocabulary: Vocabulary) -> float:
        """The fraction of the words that are not in the vocabulary."""
        in_vocabulary = sum(self.words[word] for word in vocabulary.words[len(SPECIAL) :])
        return 1 - in_vocabulary / max(self.words.total(), 1)


def split_table(stats: Mapping[str, SplitStats], vocabulary: Vocabulary) -> str:
    """Photos, captions, caption lengths and unknown words, one line per split that has photos."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for split in SPLITS:
        if stats[split].photos:
            rows.append(_table_row(split, stats[split], vocabulary))
    return _align_columns(rows)


def vocabulary_line(counts: Counter[str], vocabulary: Vocabulary, max_words: int) -> str:
    """The size of the vocabulary, and how many words of train are not in it.

    counts: word -> how often it occurs in train.
    """
    words = len(vocabulary) - len(SPECIAL)
    rare = sum(count < vocabulary.min_count for count in counts.values())
    beyond_limit = len(counts) - rare - words
    line = f"vocabulary: {words:,} words, without {rare:,} that occur fewer than {vocabulary.min_count} times in train"
    if beyond_limit:
        line += f" and {beyond_limit:,} beyond --max-words {max_words}"
    return line


def _table_row(split: str, stats: SplitStats, vocabulary: Vocabulary) -> tuple[str, ...]:
    lengths = [stats.length_quantile(fraction) for fraction in QUANTILES]
    numbers = [f"{number:,}" for number in (stats.photos, stats.captions, *lengths)]
    return (split, *numbers, f"{100 * stats.unknown_fraction(vocabulary):.2f} %")


def _align_columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(line) for line in lines)
