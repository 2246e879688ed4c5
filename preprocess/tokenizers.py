"""Tokenizers: a caption -> its words.

    jieba        Chinese words, by jieba's precise mode with its hidden Markov model
    whitespace   split at whitespace
    character    every Chinese character is a word; other runs of letters and digits are words
    fugashi      Japanese words, by MeCab with the dictionary UniDic (extra [ja])
    pythainlp    Thai words, by PyThaiNLP's newmm: the longest words of its dictionary (extra [th])

All lower the case and remove punctuation and symbols, like the tokens of the Karpathy splits: "a man's T-shirt." -> a
mans t shirt. To add a tokenizer, write a function like `separate_at_whitespace` and register it in
preprocess.TOKENIZERS.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import re
import signal
import unicodedata
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any

from captioning.errors import UserError
from preprocess import TOKENIZERS
from preprocess.languages import HAN

CHUNK_SIZE = 2_000  # captions sent to a process at once
CAPTIONS_PER_PROCESS = 20_000  # fewer do not repay the start of a process: about two seconds of jieba
SLOW_TOKENIZERS = ("jieba", "pythainlp")  # repay several processes

ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"  # pages and spreadsheets leave them between words
# In Arabic script, those of India and Khmer, joiners between letters shape them and do not end a word.
JOINED = "[\u0620-\u06ff\u0900-\u0dff\u1780-\u17d3]"
JOINER_IN_WORD = re.compile(f"(?<={JOINED})[\u200c\u200d]+(?={JOINED})")
HAN_CHARACTER_OR_RUN = re.compile(f"[{HAN}]|[^{HAN}\\s]+")


class _Normalization(dict[int, str]):
    """A table for `str.translate` that keeps letters, digits and accents. It is filled as characters occur.

    An apostrophe is removed and does not split its word; other punctuation, symbols and whitespace become spaces.
    Full-width letters and digits become ordinary ones. Zero-width characters separate words; other invisible ones
    (marks of direction, surrogates) are removed.
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
    return " " if category[0] in "PSZ" or category == "Cc" or character in ZERO_WIDTH else ""


NORMALIZATION = _Normalization()


def normalize(caption: str) -> str:
    """The caption in lower case, without punctuation and symbols: the text that every tokenizer splits."""
    return JOINER_IN_WORD.sub("", caption).translate(NORMALIZATION).lower()


# A tokenizer returns one string, not a list: a string is sent between processes many times faster.


def separate_with_jieba(caption: str) -> str:
    """The tokenizer jieba, without a user dictionary."""
    return _separate_by_dictionary(_load_dictionary(()), caption)


def _separate_by_dictionary(dictionary: Any, caption: str) -> str:
    return " ".join(dictionary.cut(normalize(caption)))


def separate_at_whitespace(caption: str) -> str:
    """The tokenizer whitespace."""
    return normalize(caption)


def separate_characters(caption: str) -> str:
    """The tokenizer character."""
    return " ".join(HAN_CHARACTER_OR_RUN.findall(normalize(caption)))


def separate_with_fugashi(caption: str) -> str:
    """The tokenizer fugashi."""
    return _load_fugashi().parse(normalize(caption))


def separate_with_pythainlp(caption: str) -> str:
    """The tokenizer pythainlp."""
    return " ".join(_load_pythainlp()(normalize(caption)))


def jieba_cut(text: str) -> list[str]:
    """The words of a Chinese text by jieba's precise mode as it is published; punctuation and spaces are words, too."""
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


@functools.lru_cache(maxsize=4)
def _load_dictionary(user_dictionary: tuple[str, ...]) -> Any:
    """A jieba.Tokenizer whose words are in lower case, as captions are, and which knows a user dictionary, too."""
    jieba = _load_jieba()
    base = _load_dictionary(()) if user_dictionary else jieba.dt
    dictionary = jieba.Tokenizer()
    dictionary.FREQ, dictionary.total, dictionary.initialized = dict(base.FREQ), base.total, True
    for entry in user_dictionary:
        word, _, frequency = entry.partition(" ")
        dictionary.add_word(word, frequency or None)
    if not user_dictionary:
        for word, frequency in base.FREQ.items():
            if frequency and word != word.lower():
                dictionary.add_word(word.lower(), frequency + dictionary.FREQ.get(word.lower(), 0))
    return dictionary


@functools.cache
def _load_fugashi() -> Any:
    """MeCab with its dictionary. Raises UserError where it is not installed."""
    try:
        import fugashi
        import unidic_lite
    except ImportError:
        raise _not_installed("fugashi", "Japanese", "ja") from None
    # Not the dictionary that another program, or an mecabrc, may have put in place: words would depend on the machine.
    return fugashi.GenericTagger(f'-r {os.devnull} -d "{unidic_lite.DICDIR}" -Owakati')


@functools.cache
def _load_pythainlp() -> Callable[[str], list[str]]:
    """PyThaiNLP's tokenizer newmm. Raises UserError where it is not installed."""
    os.environ.setdefault("PYTHAINLP_READ_ONLY", "1")  # it makes a folder in the user's home otherwise
    try:
        from pythainlp.tokenize.newmm import segment
    except ImportError:
        raise _not_installed("pythainlp", "Thai", "th") from None
    return segment


def _not_installed(tokenizer: str, language: str, extra: str) -> UserError:
    return UserError(
        f"--tokenizer {tokenizer}: needs a package for {language}; install it with: pip install 'kantu[{extra}]'"
    )


def tokenize(caption: str, tokenizer: str, user_dictionary: tuple[str, ...] = ()) -> list[str]:
    """The words of one caption; an empty list if it is all punctuation. The arguments are those of `tokenize_all`."""
    return _separating_function(tokenizer, user_dictionary)(caption).split()


def tokenize_all(
    captions: Sequence[str], tokenizer: str, workers: int = 1, user_dictionary: tuple[str, ...] = ()
) -> Generator[list[str], None, None]:
    """The words of every caption, in order.

    tokenizer: a name in TOKENIZERS. workers: processes at most, for many captions and a tokenizer of SLOW_TOKENIZERS;
    the other tokenizers run in this process, since they take less time than sending a caption to another one.
    user_dictionary: see preprocess.user_dictionary. Raises UserError when a process is killed, when a package is not
    installed, and for a user dictionary with another tokenizer than jieba.
    """
    chunks = [captions[start : start + CHUNK_SIZE] for start in range(0, len(captions), CHUNK_SIZE)]
    tokenize_chunk = functools.partial(_tokenize_chunk, tokenizer, user_dictionary)
    processes = min(workers, len(captions) // CAPTIONS_PER_PROCESS)
    texts: Iterator[str]
    if tokenizer in SLOW_TOKENIZERS and processes > 1:
        texts = _map_in_processes(tokenize_chunk, chunks, processes)
    else:
        texts = map(tokenize_chunk, chunks)
    for text in texts:
        for line in text.split("\n"):
            yield line.split()


def describe_tokenizer(tokenizer: str, user_dictionary: tuple[str, ...]) -> str:
    """The name of a tokenizer, and that it knows a user dictionary, for summaries and reports of scores."""
    return f"{tokenizer} with a user dictionary of {len(user_dictionary):,} words" if user_dictionary else tokenizer


def _separating_function(tokenizer: str, user_dictionary: tuple[str, ...]) -> Callable[[str], str]:
    """The function in TOKENIZERS. Raises UserError for a user dictionary with another tokenizer than jieba."""
    if not user_dictionary:
        return TOKENIZERS[tokenizer]
    if tokenizer != "jieba":
        raise UserError(f"--user-dict: is a dictionary of jieba, but the tokenizer is {tokenizer}; leave it out")
    return functools.partial(_separate_by_dictionary, _load_dictionary(user_dictionary))


def _tokenize_chunk(tokenizer: str, user_dictionary: tuple[str, ...], captions: Sequence[str]) -> str:
    """One line per caption. No caption contains a line break: the normalization turns line breaks into spaces."""
    return "\n".join(map(_separating_function(tokenizer, user_dictionary), captions))


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
