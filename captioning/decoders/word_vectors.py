"""Start an embedding from pretrained word vectors: word2vec, GloVe and fastText.

captioning/decoders/word_vector_files.py reads their text files. fastText's own .bin, which also has vectors for words
that it never saw (Bojanowski et al. 2017, https://arxiv.org/abs/1607.04606, eq. 2), is read by the package fasttext.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from captioning.decoders.word_vector_files import FASTTEXT_MAGIC, VectorLines, first_bytes, open_vectors
from captioning.errors import UserError
from captioning.runtime.library_errors import reason
from preprocess.vocabulary import SPECIAL, Vocabulary


class LoadedVectors(NamedTuple):
    """What a file of word vectors had. found: words of the vocabulary. damaged: lines that were skipped."""

    found: int
    damaged: int = 0
    remark: str = ""  # on a file that was not read to its announced end

    def report(self, words: int) -> str:
        """The result in words. words: of the vocabulary."""
        damaged = f"; {self.damaged:,} damaged lines skipped" if self.damaged else ""
        share = f"{self.found:,} of the vocabulary's {words:,} words ({self.found / words:.1%})"
        return f"has vectors of {share}{damaged}{self.remark}"


def load_word_vectors(weight: Tensor, path: Path, vocabulary: Vocabulary, limit: int = 0) -> LoadedVectors:
    """Copy the vectors of the vocabulary's words from the file into weight (V, E).

    limit: read only this many vectors, the first; 0 is all. Reading ends once all words are found.

    The rows of the four special words, and of words that the file does not have, stay as they are. Of several vectors
    of one word, the first counts. Damaged lines are skipped, and counted as far as they are read; the numbers of words
    that are not needed are not looked at. A file may also be the head of a larger one.

    Raises UserError if the file cannot be read or is not of this format, if its vectors do not have E numbers, if more
    of its lines are damaged than not, or if it has none of the words.
    """
    rows = {_encode(word): row for row, word in enumerate(vocabulary.words) if row >= len(SPECIAL)}
    if _is_fasttext_model(path):
        loaded = _load_fasttext_model(weight, path, rows)
    else:
        loaded = _load_text(weight, path, rows, limit)
    if not loaded.found:
        raise UserError(f"{path}: has none of the vocabulary's words; check that it is of the same language")
    return loaded


def _encode(word: str) -> bytes:
    return word.encode("utf-8", "surrogatepass")


def _load_text(weight: Tensor, path: Path, rows: dict[bytes, int], limit: int) -> LoadedVectors:
    missing = dict(rows)
    with open_vectors(path, weight.shape[1]) as lines:
        read_to_end = _copy_vectors(weight, lines, missing, limit)
    if read_to_end and lines.damaged > lines.vectors:
        raise UserError(f"{path}: {lines.damaged:,} of its {lines.read:,} lines are damaged; download it again")
    return LoadedVectors(len(rows) - len(missing), lines.damaged, _remark(lines) if read_to_end else "")


def _copy_vectors(weight: Tensor, lines: VectorLines, missing: dict[bytes, int], limit: int) -> bool:
    """Copy the vectors of these words (word -> row of weight), and remove those that are found from `missing`.

    Returns whether the file was read to its end: reading stops at the limit, and once all words are found.
    """
    for word, line in lines:
        if limit and lines.read > limit:
            return False
        if word in missing:
            vector = lines.numbers(line)
            if vector is not None:
                weight[missing.pop(word)] = torch.from_numpy(vector)
        if not missing:
            return False
    return True


def _remark(lines: VectorLines) -> str:
    """Of a file that was read to its end: whether it is only the head of a larger one."""
    announced = lines.announced or 0
    if not lines.breaks_off and lines.read >= announced:
        return ""
    expected = f" of the {announced:,} that its header announces" if announced else ""
    return f"; it is a head of {lines.read:,} vectors{expected}"


def _is_fasttext_model(path: Path) -> bool:
    try:
        return first_bytes(path).startswith(FASTTEXT_MAGIC)
    except OSError:  # reported by whoever reads on
        return False


def _load_fasttext_model(weight: Tensor, path: Path, rows: dict[bytes, int]) -> LoadedVectors:
    """Ask fastText's own package for the vector of each word: a sum over the parts of the word that the model knows."""
    try:
        import fasttext
    except ImportError:
        raise UserError(
            f"{path}: fastText's .bin needs its own package; run: pip install -e '.[fasttext]', or give the .vec file "
            "of the same download"
        ) from None
    try:
        model = fasttext.load_model(str(path))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read by fastText ({reason(error)}); download it again") from None
    size = model.get_dimension()
    if size != weight.shape[1]:
        raise UserError(f"{path}: its vectors have {size} numbers, not {weight.shape[1]}; give --embedding-size {size}")
    found = 0
    for word, row in rows.items():
        vector = model.get_word_vector(word.decode("utf-8", "replace"))
        if vector.any():  # all zeros: it knows no part of the word
            weight[row] = torch.from_numpy(vector)
            found += 1
    return LoadedVectors(found)
