"""Load pretrained word vectors from text files of word2vec, GloVe or fastText, plain or compressed (.gz).

A line holds a word and its numbers, separated by spaces. The first line of word2vec and fastText files is a header: the
number of vectors and their size.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor

from captioning.errors import UserError
from captioning.runtime.library_errors import reason
from preprocess.vocabulary import SPECIAL, Vocabulary

MAX_LINE_LENGTH = 1_000_000  # characters: a line of a compressed file may expand to any length


def load_word_vectors(weight: Tensor, path: Path, vocabulary: Vocabulary) -> int:
    """Copy the vectors of the vocabulary's words from the file into weight (V, E). Return the number of words found.

    The rows of the four special words, and of words that the file does not have, stay as they are. Of several vectors
    of one word, the first counts.
    Raises UserError if the file cannot be read or is not of this format, if its vectors do not have E numbers, or if it
    has none of the words.
    """
    word_to_id = {word: i for i, word in enumerate(vocabulary.words) if i >= len(SPECIAL)}
    found: set[str] = set()
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
            for word, numbers in _read_vectors(file, path, weight.shape[1]):
                if word in word_to_id and word not in found:
                    weight[word_to_id[word]] = torch.from_numpy(np.array(numbers, np.float32))
                    found.add(word)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); give a text file of word vectors") from None
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: is not a text file of word vectors ({reason(error)}); give a .txt or .vec file of word2vec, "
            "GloVe or fastText"
        ) from None
    if not found:
        raise UserError(f"{path}: has none of the vocabulary's words; check that it is of the same language")
    return len(found)


def _read_vectors(file: TextIO, path: Path, size: int) -> Iterator[tuple[str, list[str]]]:
    """Yield each word and its `size` numbers as strings.

    Raises ValueError for a damaged line; UserError for vectors of another size, or for fewer vectors than the header
    announces.
    """
    num_lines = 0
    expected = None  # vectors, as the header announces
    for num_lines, line in enumerate(iter(lambda: file.readline(MAX_LINE_LENGTH), ""), 1):
        fields = line.rstrip().split(" ")
        if num_lines == 1 and len(fields) == 2 and all(field.isdecimal() for field in fields):  # a header
            _check_size(int(fields[1]), size, path)
            expected = int(fields[0])
            continue
        if num_lines <= 2:
            _check_size(len(fields) - 1, size, path)
        if len(fields) <= size or "\0" in line:
            raise ValueError(f"line {num_lines} is damaged")
        yield " ".join(fields[:-size]), fields[-size:]  # some words of GloVe contain spaces
    if expected is not None and num_lines - 1 < expected:
        raise UserError(
            f"{path}: has {num_lines - 1:,} of the {expected:,} vectors that its header announces; download it again"
        )


def _check_size(found: int, expected: int, path: Path) -> None:
    if found != expected:
        raise UserError(f"{path}: its vectors have {found} numbers, not {expected}; give --embedding-size {found}")
