"""Word vectors that were learnt elsewhere, from a text file of word2vec, GloVe or fastText, plain or .gz.

A line is a word and its numbers, parted by spaces; word2vec's and fastText's first line says how many there are.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from captioning.errors import UserError
from preprocess.vocabulary import SPECIAL, Vocabulary

LONGEST = 1_000_000  # characters read as one line: of a compressed file, a line could be any length


def put_word_vectors(weight: Tensor, path: Path, vocabulary: Vocabulary) -> int:
    """Write the vectors of the words that the file has into weight (V, E) -> how many there were.

    The others, the four special ones among them, stay as they are. Raises UserError where the file is not of this
    kind, its vectors are not E long, or it has not one of the words.
    """
    size = weight.shape[1]
    rows = {word: row for row, word in enumerate(vocabulary.words) if row >= len(SPECIAL)}
    found: set[str] = set()
    number, told = 0, None  # lines read; vectors as the first line tells
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), 1):
                parts = line.rstrip().split(" ")
                if number == 1 and len(parts) == 2 and all(part.isdecimal() for part in parts):
                    check_size(int(parts[1]), size, path)
                    told = int(parts[0])
                    continue
                if number <= 2:
                    check_size(len(parts) - 1, size, path)
                if len(parts) <= size or "\0" in line:
                    raise ValueError(f"line {number} is damaged")
                word = " ".join(parts[:-size])  # GloVe has some words with spaces
                if word in rows and word not in found:
                    weight[rows[word]] = torch.from_numpy(np.array(parts[-size:], np.float32))
                    found.add(word)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give a text file of word vectors") from None
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: is not a text file of word vectors ({' '.join(str(error).split())[:80]}); give a .txt or .vec "
            "file of word2vec, GloVe or fastText"
        ) from None
    if told is not None and number - 1 < told:
        raise UserError(f"{path}: has {number - 1:,} of the {told:,} vectors that its first line tells; get it again")
    if not found:
        raise UserError(f"{path}: has none of the vocabulary's words; is it of another language?")
    return len(found)


def check_size(there: int, wanted: int, path: Path) -> None:
    if there != wanted:
        raise UserError(f"{path}: its vectors have {there} numbers, not {wanted}; give --embedding-size {there}")
