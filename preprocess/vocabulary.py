"""The vocabulary: which word is which number. It is built from the train split alone."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.files import atomic_text
from preprocess.tokenizers import TOKENIZERS

VOCABULARY_FILE = "vocab.json"
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
PAD, UNKNOWN, START, END = range(4)


@dataclass(frozen=True)
class Vocabulary:
    """`words[i]` is word i; the first four are SPECIAL. Equal vocabularies have equal fields.

    language: "zh" or "en"; tokenizer: the one that cut the captions; min_count: times a word had to occur.
    Raises ValueError when the fields are no vocabulary.
    """

    language: str
    tokenizer: str
    min_count: int
    words: tuple[str, ...]

    def __post_init__(self):
        problem = _problem(self)
        if problem:
            raise ValueError(f"not a vocabulary: {problem}")

    @classmethod
    def build(
        cls, captions: Iterable[Sequence[str]], *, language: str, tokenizer: str, min_count: int, max_words: int
    ) -> Vocabulary:
        """The vocabulary of these captions (of train): see `from_counts`."""
        counts = Counter(chain.from_iterable(captions))
        return cls.from_counts(counts, language=language, tokenizer=tokenizer, min_count=min_count, max_words=max_words)

    @classmethod
    def from_counts(
        cls, counts: Counter[str], *, language: str, tokenizer: str, min_count: int, max_words: int
    ) -> Vocabulary:
        """The special words, then the `max_words` most frequent of those that occur `min_count` times or more.

        Words of one count are in alphabetical order, so that the same captions give the same vocabulary.
        """
        frequent = (word for word, count in counts.items() if count >= min_count and word not in SPECIAL)
        words = sorted(frequent, key=lambda word: (-counts[word], word))[:max_words]
        return cls(language, tokenizer, min_count, SPECIAL + tuple(words))

    def __len__(self) -> int:
        return len(self.words)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """Word -> number. The special words are left out: a caption that says "<end>" must not end there."""
        return {word: number for number, word in enumerate(self.words) if number >= len(SPECIAL)}

    def encode(self, words: Iterable[str]) -> list[int]:
        """The words' numbers, without <start> and <end>; UNKNOWN for a word that is not in the vocabulary."""
        numbers = self.numbers
        return [numbers.get(word, UNKNOWN) for word in words]

    def decode(self, indices: Iterable[int]) -> list[str]:
        """The words of these numbers, the special ones among them."""
        return [self.words[index] for index in indices]

    def joined(self, words: Iterable[str]) -> str:
        """The words as a person writes them: side by side in Chinese, with spaces in English."""
        return ("" if self.language == "zh" else " ").join(words)

    def to_dict(self) -> dict:
        """Plain data, for vocab.json and checkpoints."""
        return {**asdict(self), "words": list(self.words)}

    @classmethod
    def from_dict(cls, data: object) -> Vocabulary:
        """The vocabulary that `to_dict` wrote. Raises ValueError for anything else."""
        keys = list(cls.__dataclass_fields__)
        if not isinstance(data, dict) or data.keys() != set(keys) or not isinstance(data["words"], (list, tuple)):
            raise ValueError(f"not a vocabulary (an object with the keys {', '.join(keys)}, words a list)")
        return cls(**{**data, "words": tuple(data["words"])})

    def save(self, path: Path) -> None:
        """Write vocab.json, whole or not at all."""
        with atomic_text(path) as file:
            json.dump(self.to_dict(), file, ensure_ascii=False, indent=0)
            file.write("\n")

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read vocab.json. Raises UserError where it is missing or malformed."""
        remedy = f"make it with: python -m preprocess {path.parent}"
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path}: no vocabulary; {remedy}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions, or {remedy}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error}); {remedy}") from None
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise UserError(f"{path}: {error}; {remedy}") from None


def _problem(vocabulary: Vocabulary) -> str | None:
    """What is wrong with the fields, in a few words."""
    if vocabulary.language not in ("zh", "en"):
        return f"language {vocabulary.language!r} is neither zh nor en"
    if vocabulary.tokenizer not in tuple(TOKENIZERS):
        return f"tokenizer {vocabulary.tokenizer!r} is none of {', '.join(TOKENIZERS)}"
    if type(vocabulary.min_count) is not int or vocabulary.min_count < 1:
        return f"min_count {vocabulary.min_count!r} is not 1 or more"
    words = vocabulary.words
    if not all(type(word) is str and word for word in words):
        return "a word that is no text, or empty"
    if words[: len(SPECIAL)] != SPECIAL:
        return f"its first words are not {' '.join(SPECIAL)}"
    if len(set(words)) < len(words):
        return "a word that is there twice"
    return None
