"""A caption -> its words, by one of three tokenizers.

    jieba        Chinese words: jieba's precise mode with its hidden Markov model
    character    every Chinese character by itself; a run of other letters and digits is one word, in lower case
    whitespace   lower case, cut at spaces

All drop punctuation and symbols, as the tokens of Karpathy's files do: "a man's T-shirt." -> a mans t shirt.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import re
import signal
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from captioning.errors import UserError

CHUNK = 2_000  # captions that travel to a process at once
SHARE = 20_000  # captions that are worth the start of a process: about two seconds of jieba
SAMPLE = 2_000  # captions looked at to see their language

HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_han = re.compile(f"[{HAN}]")
_character = re.compile(f"[{HAN}]|[^{HAN}\\s]+")


class _Letters(dict):
    """A table for `str.translate`, filled as characters are met: letters, digits and accents stay.

    An apostrophe goes and its word stays whole; every other mark, symbol or space becomes a space. Full-width
    letters and digits become ordinary ones. What is not seen (zero-width, surrogates) goes.
    """

    def __missing__(self, code: int) -> str:
        self[code] = self._written(chr(code))
        return self[code]

    def _written(self, character: str) -> str:
        kind = unicodedata.category(character)
        if character in "'\u2019" or unicodedata.name(character, "").startswith("VARIATION SELECTOR"):  # an emoji's
            return ""
        if kind[0] in "LN" or kind in ("Mn", "Mc"):
            wide = unicodedata.decomposition(character).startswith("<wide>")
            return unicodedata.normalize("NFKC", character) if wide else character
        return " " if kind[0] in "PSZ" or kind == "Cc" else ""


_letters = _Letters()


def jieba_cut(text: str) -> list[str]:
    """The words of a Chinese text by jieba's precise mode; marks and spaces are words, too."""
    return list(_jieba().cut(text))


def _cut_with_jieba(caption: str) -> str:
    return " ".join(jieba_cut(caption.translate(_letters)))


def _cut_by_character(caption: str) -> str:
    return " ".join(_character.findall(caption.translate(_letters).lower()))


def _cut_at_whitespace(caption: str) -> str:
    return caption.translate(_letters).lower()


# Each writes a caption with its words apart: a plain text crosses processes many times faster than a list of words.
TOKENIZERS: dict[str, Callable[[str], str]] = {
    "jieba": _cut_with_jieba,
    "whitespace": _cut_at_whitespace,
    "character": _cut_by_character,
}


@functools.cache
def _jieba():
    """jieba, loaded once, without its log lines and the warnings of its import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources is deprecated; invalid escape sequences
        import jieba
    jieba.setLogLevel(logging.CRITICAL)
    words = jieba.dt  # not initialize(): it trusts jieba.cache where anyone may write, /tmp, and is no faster for it
    words.FREQ, words.total = words.gen_pfdict(words.get_dict_file())
    words.initialized = True
    return jieba


def detect_language(captions: Sequence[str]) -> str:
    """zh where most letters are Han characters, else en: a look at 2,000 captions, evenly spread over all."""
    letters = "".join(captions[:: len(captions) // SAMPLE + 1])
    han = len(_han.findall(letters))
    return "zh" if 2 * han > sum(map(str.isalpha, letters)) else "en"


def default_tokenizer(language: str) -> str:
    return "jieba" if language == "zh" else "whitespace"


def tokenize(caption: str, tokenizer: str) -> list[str]:
    """The words of one caption; none where it is all punctuation."""
    return TOKENIZERS[tokenizer](caption).split()


def tokenize_all(captions: Sequence[str], tokenizer: str, workers: int = 1) -> Iterator[list[str]]:
    """The words of every caption, in order.

    Many captions are cut by up to `workers` processes where that pays: jieba takes longer over a caption
    than the caption takes to travel, the other tokenizers do not. Raises UserError when a process is killed.
    """
    chunks = [captions[start : start + CHUNK] for start in range(0, len(captions), CHUNK)]
    processes = min(workers, len(captions) // SHARE)
    cut = functools.partial(_cut_chunk, tokenizer)
    texts = _in_processes(cut, chunks, processes) if tokenizer == "jieba" and processes > 1 else map(cut, chunks)
    for text in texts:
        for line in text.split("\n"):
            yield line.split()


def _cut_chunk(tokenizer: str, captions: Sequence[str]) -> str:
    """A line a caption. No caption brings a line break of its own: the table turns them into spaces."""
    return "\n".join(map(TOKENIZERS[tokenizer], captions))


def _in_processes(cut: Callable, chunks: list, processes: int) -> Iterator[str]:
    # spawn: the same on every system, safe beside threads, and a process starts without a copy of our memory.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _leave_interrupts_to_the_parent)
    try:
        yield from pool.map(cut, chunks)
    except BrokenProcessPool:
        raise UserError("a process that cuts captions was killed, perhaps for memory; give fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
