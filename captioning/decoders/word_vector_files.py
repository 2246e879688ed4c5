"""Files of word vectors, read line by line: word2vec, GloVe and fastText as text, plain, .gz, .bz2, .xz or in a .zip.

A line holds a word and its numbers, separated by spaces, tabs or commas. The first line of word2vec and fastText files
is a header: the number of vectors and their size. Everything is told from the content; endings do not count.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from captioning.errors import UserError
from captioning.runtime.library_errors import reason

MAX_LINE_LENGTH = 100_000  # bytes: a line of a compressed file may expand to any length
MAX_SIZE = 10_000  # numbers of a vector
HEAD_LINES = 20  # lines that decide on the form
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}  # by the first bytes
ZIP_MAGIC = b"PK\3\4"
ENCRYPTED = 1  # a bit of a zip member's flags
FASTTEXT_MAGIC = (793_712_314).to_bytes(4, "little")  # of fastText's .bin
CONVERT = "gensim writes one: KeyedVectors.load_word2vec_format(FILE, binary=True).save_word2vec_format('text.vec')"
UNREADABLE = (OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)


class VectorLines:
    """The vectors of a text: iterate for the word and the line of each, and count what is passed over.

    has_vectors: whether the first lines do. size: how many numbers a vector has. announced: how many vectors the header
    promises; None without a header. vectors, damaged: lines read so far, without the header. breaks_off: whether the
    compressed stream ended in its middle. starts_with_magic: whether it is fastText's .bin.
    """

    def __init__(self, stream: BinaryIO):
        self.vectors = self.damaged = 0
        self.breaks_off = False
        self._lines = self._read_lines(stream)
        head = list(islice(self._lines, HEAD_LINES))
        self.starts_with_magic = bool(head) and head[0].startswith(FASTTEXT_MAGIC)
        if head:
            head[0] = head[0].removeprefix(BYTE_ORDER_MARK)
        header = _parse_header(head[0]) if head else None
        self._head = head[1:] if header else head
        commas = sum(line.count(b",") for line in self._head)
        blanks = sum(max(len(line.split(None, MAX_SIZE)) - 1, 1) for line in self._head)
        self._delimiter = b"," if commas >= blanks else None
        counts = Counter(filter(None, map(self._count_numbers, self._head)))
        self.announced = header[0] if header else None
        self.size = header[1] if header else max(counts, key=counts.__getitem__, default=0)
        self.has_vectors = bool(counts)

    def _read_lines(self, stream: BinaryIO) -> Iterator[bytes]:
        """The lines, in pieces of at most MAX_LINE_LENGTH bytes."""
        try:
            while line := stream.readline(MAX_LINE_LENGTH):
                yield line
        except EOFError:
            self.breaks_off = True

    def _count_numbers(self, line: bytes) -> int:
        """How many numbers a line ends in, its first field aside."""
        count = 0
        for field in reversed(line.rsplit(self._delimiter, MAX_SIZE)[1:]):
            try:
                float(field)
            except ValueError:
                break
            count += 1
        return count

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the word of each vector, and its line, whose numbers are not yet looked at."""
        for line in chain(self._head, self._lines):
            word = None if self._is_cut(line) else self._word(line)
            if word is None:
                self.damaged += 1
            else:
                self.vectors += 1
                yield word, line

    def _is_cut(self, line: bytes) -> bool:
        """Whether a line is the last of a file that was cut, so that digits may be missing."""
        return not line.endswith(b"\n") and self.announced is not None and self.read + 1 < self.announced

    def _word(self, line: bytes) -> bytes | None:
        """The word of a line, which may hold spaces (in GloVe); None if numbers are missing, or it is not UTF-8."""
        blanks = line.count(b" ") - line.endswith(b" \n")
        if self._delimiter is None and blanks == self.size:  # most lines: several times faster than rsplit
            word = line[: line.index(b" ")]
        else:
            fields = line.rsplit(self._delimiter, self.size)
            if len(fields) <= self.size:
                return None
            word = fields[0].strip()
        if self._delimiter and len(word) > 1 and word[:1] == word[-1:] == b'"':  # a quoted field
            word = word[1:-1].replace(b'""', b'"')
        try:
            word.decode()
        except UnicodeDecodeError:
            return None
        return word

    def numbers(self, line: bytes) -> np.ndarray | None:
        """The vector of a line, (size,) float32; None, and counted, if a number is none or not finite."""
        fields = line.rsplit(self._delimiter, self.size)[1:]
        try:
            with np.errstate(over="ignore"):  # too large for float32: not finite
                vector = np.array([float(field) for field in fields]).astype(np.float32)
        except ValueError:
            vector = np.array([np.nan], np.float32)
        if len(vector) == self.size and np.isfinite(vector).all():
            return vector
        self.vectors -= 1
        self.damaged += 1
        return None

    @property
    def read(self) -> int:
        """Lines read so far, without the header."""
        return self.vectors + self.damaged


def _parse_header(line: bytes) -> tuple[int, int] | None:
    """The number of vectors and their size, if the line is a header."""
    fields = line.replace(b",", b" ").split()
    if len(fields) == 2 and all(field.isdigit() and len(field) < 20 for field in fields):
        return int(fields[0]), int(fields[1])
    return None


@contextlib.contextmanager
def open_vectors(path: Path, size: int) -> Iterator[VectorLines]:
    """Open a file of vectors of `size` numbers; of a .zip, the first file in it that holds such vectors.

    Raises UserError if the file cannot be read, also from the body, holds no vectors, or only vectors of other sizes.
    """
    sizes: set[int] = set()
    try:
        for stream in _open_texts(path):
            lines = VectorLines(stream)
            if lines.starts_with_magic:
                raise UserError(f"{path}: is fastText's .bin, compressed; unpack it, and give the .bin")
            if lines.has_vectors and lines.size == size:
                yield lines
                return
            if lines.has_vectors:
                sizes.add(lines.size)
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); give a text file of word vectors") from None
    if not sizes:
        raise UserError(
            f"{path}: is not a text file of word vectors; give a .txt or .vec file of word2vec, GloVe or fastText; for "
            f"word2vec's .bin, {CONVERT}"
        )
    found = " or ".join(map(str, sorted(sizes)))
    raise UserError(f"{path}: its vectors have {found} numbers, not {size}; give --embedding-size {min(sizes)}")


def _open_texts(path: Path) -> Iterator[BinaryIO]:
    """Open the decompressed file; of a .zip, each file in it, one after the other."""
    start = first_bytes(path)
    if start.startswith(ZIP_MAGIC):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.flag_bits & ENCRYPTED:
                    raise UserError(f"{path}: is encrypted; unpack it, and give the text file")
                if not member.is_dir() and not member.filename.startswith("__MACOSX/"):
                    with archive.open(member) as file:
                        yield cast(BinaryIO, io.BufferedReader(file, 1 << 20))  # type: ignore[type-var]
        return
    opener = next((opener for magic, opener in COMPRESSIONS.items() if start.startswith(magic)), open)
    with opener(path, "rb") as file:  # type: ignore[operator]
        yield file  # not in another BufferedReader, which would lose what precedes the break of a broken stream


def first_bytes(path: Path) -> bytes:
    """The first bytes of a file, which name its form. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(8)
