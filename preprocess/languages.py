"""The languages of captions, told from their script, and what depends on them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLE = 2_000  # captions from which the language, and whether they are cut by hand, are told

HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
THAI = "\u0e01-\u0e5b"
HAN_CHARACTER = re.compile(f"[{HAN}]")
KANA_CHARACTER = re.compile(f"[{KANA}]")
THAI_CHARACTER = re.compile(f"[{THAI}]")


@dataclass(frozen=True)
class Language:
    """What the words of a language, and the checks of its captions, depend on."""

    tokenizer: str  # name in preprocess.TOKENIZERS, unless --tokenizer names another
    has_spaces: bool  # between words
    max_mean_letters: int  # per word; only whole sentences are longer on average
    min_count: int = 5  # of a word in train, unless --min-count gives another
    script: re.Pattern[str] | None = None  # a letter of it; None: Latin


LANGUAGES = {
    "en": Language("whitespace", has_spaces=True, max_mean_letters=8),
    "zh": Language("jieba", has_spaces=False, max_mean_letters=3, min_count=2, script=HAN_CHARACTER),
    "ja": Language("fugashi", has_spaces=False, max_mean_letters=3, script=re.compile(f"[{HAN}{KANA}]")),
    "th": Language("pythainlp", has_spaces=False, max_mean_letters=8, script=THAI_CHARACTER),
}


def detect_language(captions: Sequence[str]) -> str:
    """The language by the script of most letters: th, ja (Han characters and kana), zh (Han characters), else en."""
    text = "".join(_sample(captions))
    letters = sum(map(str.isalpha, text))
    han, kana, thai = (len(script.findall(text)) for script in (HAN_CHARACTER, KANA_CHARACTER, THAI_CHARACTER))
    if 2 * thai > letters:
        return "th"
    if 2 * (han + kana) > letters:
        return "ja" if 5 * kana > han + kana else "zh"  # の also adorns Chinese; Japanese is kana by a half or more
    return "en"


def default_tokenizer(language: str) -> str:
    """The tokenizer of a language, unless --tokenizer names another."""
    return LANGUAGES[language].tokenizer


def is_cut_by_hand(captions: Sequence[str], language: str) -> bool:
    """Whether captions of a language without spaces have them nonetheless, between words.

    So are the references of AI Challenger. A space here and there, between sentences or beside Latin letters, leaves
    pieces that are longer than words.
    """
    if LANGUAGES[language].has_spaces:
        return False
    pieces = [caption.split() for caption in _sample(captions)]
    separated = sum(len(words) > 1 for words in pieces)
    letters = sum(len(word) for words in pieces for word in words)
    is_short = letters <= LANGUAGES[language].max_mean_letters * sum(map(len, pieces))
    return is_short and 2 * separated > len(pieces)


def separator(language: str, tokenizer: str) -> str:
    """What joins words to running text: nothing where no spaces are written, unless the captions are cut by spaces."""
    return " " if LANGUAGES[language].has_spaces or tokenizer == "whitespace" else ""


def _sample(captions: Sequence[str]) -> Sequence[str]:
    """Up to SAMPLE captions, evenly spaced."""
    return captions[:: len(captions) // SAMPLE + 1]
