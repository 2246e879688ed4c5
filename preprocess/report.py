"""What preprocessing found, counted while the captions pass by, and told in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from preprocess.annotations import SPLITS
from preprocess.captions import Photo
from preprocess.vocabulary import SPECIAL, Vocabulary

HEADINGS = ("split", "photos", "captions", "words: median", "90 %", "99 %", "max", "unknown")


@dataclass
class SplitStats:
    """The counts of one split."""

    photos: int = 0
    words: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)  # words of a caption -> captions

    def add(self, photo: Photo) -> None:
        self.photos += 1
        self.lengths.update(map(len, photo.captions))
        for words in photo.captions:
            self.words.update(words)

    def length(self, share: float) -> int:
        """The least length that at least this share of the captions keeps within (nearest rank)."""
        wanted = share * self.lengths.total()
        covered = 0
        for length, captions in sorted(self.lengths.items()):
            covered += captions
            if covered >= wanted:
                return length
        return 0

    def unknown(self, vocabulary: Vocabulary) -> float:
        """The share of the words that the vocabulary does not have."""
        known = sum(self.words[word] for word in vocabulary.words[len(SPECIAL) :])
        return 1 - known / max(self.words.total(), 1)


def split_table(tallies: dict[str, SplitStats], vocabulary: Vocabulary) -> str:
    """Photos, captions, lengths and unknown words, a line a split."""
    rows = [HEADINGS]
    for split in SPLITS:
        tally = tallies[split]
        if tally.photos:
            lengths = (tally.length(share) for share in (0.5, 0.9, 0.99, 1))
            rows.append((split, *_numbers(tally.photos, tally.lengths.total(), *lengths)))
            rows[-1] += (f"{100 * tally.unknown(vocabulary):.2f} %",)
    return _aligned(rows)


def vocabulary_line(counts: Counter[str], vocabulary: Vocabulary, max_words: int) -> str:
    """The vocabulary's size, and what it left out."""
    words = len(vocabulary) - len(SPECIAL)
    rare = sum(count < vocabulary.min_count for count in counts.values())
    line = f"vocabulary: {words:,} words; {rare:,} seen fewer than {vocabulary.min_count} times in train are left out"
    more = len(counts) - rare - words
    return line + (f", and {more:,} more by --max-words {max_words}" if more else "")


def _numbers(*values: int) -> Iterable[str]:
    return (f"{value:,}" for value in values)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(line) for line in lines)
