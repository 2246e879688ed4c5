"""Tokenizers: a caption -> its words.

    jieba        Chinese words, by jieba's precise mode with its hidden Markov model
    whitespace   lower case, split at whitespace
    character    every Chinese character is a word; other runs of letters and digits are words, in lower case

All remove punctuation and symbols, like the tokens of the Karpathy splits: "a man's T-shirt." -> a mans t shirt.
To add a tokenizer, write a function like `separate_at_whitespace` and register it in preprocess.TOKENIZERS.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import re
import signal
import unicodedata
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType

from captioning.errors import UserError
from preprocess import TOKENIZERS

CHUNK_SIZE = 2_000  # captions sent to a process at once
CAPTIONS_PER_PROCESS = 20_000  # fewer do not repay the start of a process: about two seconds of jieba
LANGUAGE_SAMPLE = 2_000  # captions from which the language is detected

SEPARATORS = "\u200b\ufeff"  # zero-width space, and the same without a break: pages and spreadsheets leave them
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
HAN_CHARACTER = re.compile(f"[{HAN}]")
HAN_CHARACTER_OR_RUN = re.compile(f"[{HAN}]|[^{HAN}\\s]+")


class _Normalization(dict[int, str]):
    """A table for `str.translate` that keeps letters, digits and accents. It is filled as characters occur.

    An apostrophe is removed and does not split its word; other punctuation, symbols and whitespace become spaces.
    Full-width letters and digits become ordinary ones. Zero-width spaces separate words; other
    invisible characters (joiners, surrogates) are removed.
    """

    def __missing__(self, code: int) -> str:
        self[code] = _normalize(chr(code))
        return self[code]


def _normalize(character: str) -> str:
    category = unicodedata.category(character)
    is_variation_selector = unicodedata.name(character, "").startswith("VARIATION SELECTOR")  # follows an emoji
    if character in "'\u2019" or is_variation_selector:
        return ""
    if category[0] in "LN" or category in ("Mn", "Mc"):
        is_full_width = unicodedata.decomposition(character).startswith("<wide>")
        return unicodedata.normalize("NFKC", character) if is_full_width else character
    return " " if category[0] in "PSZ" or category == "Cc" or character in SEPARATORS else ""


NORMALIZATION = _Normalization()


# A tokenizer returns one string, not a list: a string is sent between processes many times faster.


def separate_with_jieba(caption: str) -> str:
    """The tokenizer jieba."""
    return " ".join(jieba_cut(caption.translate(NORMALIZATION)))


def separate_at_whitespace(caption: str) -> str:
    """The tokenizer whitespace."""
    return caption.translate(NORMALIZATION).lower()


def separate_characters(caption: str) -> str:
    """The tokenizer character."""
    return " ".join(HAN_CHARACTER_OR_RUN.findall(caption.translate(NORMALIZATION).lower()))


def jieba_cut(text: str) -> list[str]:
    """The words of a Chinese text by jieba's precise mode; punctuation and spaces are words, too."""
    return list(_load_jieba().cut(text))


@functools.cache
def _load_jieba() -> ModuleType:
    """jieba with its dictionary, loaded once, without log lines and warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources is deprecated; invalid escape sequences
        import jieba
    jieba.setLogLevel(logging.CRITICAL)
    # Not jieba.initialize(): it trusts jieba.cache in /tmp, where any user may write, and is not faster.
    tokenizer = jieba.dt
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return jieba


def detect_language(captions: Sequence[str]) -> str:
    """zh if more than half of the letters are Han characters, else en. Samples up to 2,000 captions, evenly spaced."""
    letters = "".join(captions[:: len(captions) // LANGUAGE_SAMPLE + 1])
    num_han = len(HAN_CHARACTER.findall(letters))
    return "zh" if 2 * num_han > sum(map(str.isalpha, letters)) else "en"


def default_tokenizer(language: str) -> str:
    """The tokenizer of a language, unless --tokenizer names another."""
    return "jieba" if language == "zh" else "whitespace"


def tokenize(caption: str, tokenizer: str) -> list[str]:
    """The words of one caption; an empty list if it is all punctuation."""
    return TOKENIZERS[tokenizer](caption).split()


def tokenize_all(captions: Sequence[str], tokenizer: str, workers: int = 1) -> Generator[list[str], None, None]:
    """The words of every caption, in order.

    jieba tokenizes many captions in up to `workers` processes. The other tokenizers run in this process: they take
    less time than sending a caption to another one. Raises UserError when a process is killed.
    """
    chunks = [captions[start : start + CHUNK_SIZE] for start in range(0, len(captions), CHUNK_SIZE)]
    tokenize_chunk = functools.partial(_tokenize_chunk, tokenizer)
    processes = min(workers, len(captions) // CAPTIONS_PER_PROCESS)
    texts: Iterator[str]
    if tokenizer == "jieba" and processes > 1:
        texts = _map_in_processes(tokenize_chunk, chunks, processes)
    else:
        texts = map(tokenize_chunk, chunks)
    for text in texts:
        for line in text.split("\n"):
            yield line.split()


def _tokenize_chunk(tokenizer: str, captions: Sequence[str]) -> str:
    """One line per caption. No caption contains a line break: the normalization turns line breaks into spaces."""
    return "\n".join(map(TOKENIZERS[tokenizer], captions))


def _map_in_processes(function: Callable[..., str], chunks: Iterable, processes: int) -> Iterator[str]:
    # spawn: the same on every system, safe with threads, and a process starts without a copy of this one's memory.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _ignore_interrupts)
    try:
        yield from pool.map(function, chunks)
    except BrokenProcessPool:
        raise UserError("a tokenizing process was killed; if memory ran out, give fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """In a worker process: Ctrl-C is handled by the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
