"""The vocabulary: word <-> id. It is built from the train split alone."""

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
from captioning.runtime.library_errors import reason
from preprocess import TOKENIZERS
from preprocess.languages import LANGUAGES, separator
from preprocess.tokenizers import describe_tokenizer, tokenize

VOCABULARY_FILE = "vocab.json"
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
PAD, UNKNOWN, START, END = range(4)


@dataclass(frozen=True)
class Vocabulary:
    """The word with id i is `words[i]`; the first four are SPECIAL. Vocabularies with equal fields are equal.

    language: a name in LANGUAGES. tokenizer: the name of the tokenizer of the captions. min_count: how often a word had
    to occur in train. user_dictionary: the entries of --user-dict, see preprocess.user_dictionary. Raises ValueError
    for invalid fields.
    """

    language: str
    tokenizer: str
    min_count: int
    words: tuple[str, ...]
    user_dictionary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problem = _find_problem(self)
        if problem:
            raise ValueError(f"not a vocabulary: {problem}")

    @classmethod
    def build(
        cls, captions: Iterable[Sequence[str]], *, language: str, tokenizer: str, min_count: int, max_words: int
    ) -> Vocabulary:
        """The vocabulary of the tokenized captions of train: see `from_counts`."""
        counts = Counter(chain.from_iterable(captions))
        return cls.from_counts(counts, language=language, tokenizer=tokenizer, min_count=min_count, max_words=max_words)

    @classmethod
    def from_counts(
        cls,
        counts: Counter[str],
        *,
        language: str,
        tokenizer: str,
        min_count: int,
        max_words: int,
        user_dictionary: tuple[str, ...] = (),
    ) -> Vocabulary:
        """The special words, then the `max_words` most frequent words that occur at least `min_count` times.

        Words of equal count are in alphabetical order, so that the same captions give the same vocabulary.
        """
        frequent = [word for word, count in counts.items() if count >= min_count and word not in SPECIAL]
        words = sorted(frequent, key=lambda word: (-counts[word], word))[:max_words]
        return cls(language, tokenizer, min_count, SPECIAL + tuple(words), user_dictionary)

    def __len__(self) -> int:
        return len(self.words)

    @functools.cached_property
    def word_to_id(self) -> dict[str, int]:
        """Word -> id, without the special words: the text "<end>" in a caption must not end it."""
        return {word: id for id, word in enumerate(self.words) if id >= len(SPECIAL)}

    def encode(self, words: Iterable[str]) -> list[int]:
        """The ids of the words, without <start> and <end>; UNKNOWN for a word that is not in the vocabulary."""
        word_to_id = self.word_to_id
        return [word_to_id.get(word, UNKNOWN) for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words of these ids, including special words."""
        return [self.words[id] for id in ids]

    def join(self, words: Iterable[str]) -> str:
        """The words as running text, with spaces if the language has them or the captions were cut by them."""
        return separator(self.language, self.tokenizer).join(words)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, split as the captions of the data set were."""
        return tokenize(text, self.tokenizer, self.user_dictionary)

    @property
    def tokenizer_text(self) -> str:
        """The tokenizer, and that it has a user dictionary, for people."""
        return describe_tokenizer(self.tokenizer, self.user_dictionary)

    def to_dict(self) -> dict:
        """JSON-ready data, for vocab.json and checkpoints. There is no key user_dictionary if it is empty."""
        data = {**asdict(self), "words": list(self.words), "user_dictionary": list(self.user_dictionary)}
        if not self.user_dictionary:
            del data["user_dictionary"]
        return data

    @classmethod
    def from_dict(cls, data: object) -> Vocabulary:
        """The inverse of `to_dict`. Raises ValueError for data that is not a vocabulary."""
        keys = [key for key in cls.__dataclass_fields__ if key != "user_dictionary"]
        if not isinstance(data, dict) or data.keys() - {"user_dictionary"} != set(keys):
            raise ValueError(f"not a vocabulary (an object with the keys {', '.join(keys)}, words a list)")
        lists = {"words": data["words"], "user_dictionary": data.get("user_dictionary", ())}
        for key, value in lists.items():
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"not a vocabulary (an object with the keys {', '.join(keys)}, {key} a list)")
        return cls(**{**data, **{key: tuple(value) for key, value in lists.items()}})

    def save(self, path: Path) -> None:
        """Write vocab.json atomically."""
        with atomic_text(path) as file:
            json.dump(self.to_dict(), file, ensure_ascii=False, indent=0)
            file.write("\n")

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read vocab.json. Raises UserError if it is missing or malformed."""
        remedy = f"make it with: python -m preprocess {path.parent}"
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path}: no vocabulary; {remedy}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({reason(error)}); check its permissions, or {remedy}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error}); {remedy}") from None
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise UserError(f"{path}: {error}; {remedy}") from None


def _find_problem(vocabulary: Vocabulary) -> str | None:
    """What is wrong with the fields, for an error message; None if they are valid."""
    if vocabulary.language not in list(LANGUAGES):  # a list: what a file holds may not be hashable
        return f"language {vocabulary.language!r} is none of {', '.join(LANGUAGES)}"
    if vocabulary.tokenizer not in list(TOKENIZERS):
        return f"tokenizer {vocabulary.tokenizer!r} is none of {', '.join(TOKENIZERS)}"
    if type(vocabulary.min_count) is not int or vocabulary.min_count < 1:
        return f"min_count {vocabulary.min_count!r} is not an integer of at least 1"
    words = vocabulary.words
    if not all(type(word) is str and word for word in words + vocabulary.user_dictionary):
        return "a word is not text, or is empty"
    if vocabulary.user_dictionary and vocabulary.tokenizer != "jieba":
        return f"a user dictionary is jieba's, not one of the tokenizer {vocabulary.tokenizer}"
    if words[: len(SPECIAL)] != SPECIAL:
        return f"the first words are not {' '.join(SPECIAL)}"
    if len(set(words)) < len(words):
        return "a word occurs twice"
    return None
