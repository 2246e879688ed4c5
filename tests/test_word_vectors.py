"""Pretrained word vectors from text files, in each format in which they are published."""

import gzip
import tracemalloc

import pytest
import torch

from captioning.decoders.word_vectors import load_word_vectors
from captioning.errors import UserError
from preprocess.vocabulary import SPECIAL, Vocabulary

VOCABULARY = Vocabulary("zh", "jieba", 1, (*SPECIAL, "男人", "狗", "new york", "树"))
LINES = ["狗 1 2 3", "the 7 7 7", "男人 0.5 -1e-2 4", "new york 1 1 1", "狗 9 9 9", "<end> 8 8 8"]


def load(path, size=3):
    """The number of words found, and the weight (8, size), which is -1 where no vector was copied."""
    weight = torch.full((8, size), -1.0)
    return load_word_vectors(weight, path, VOCABULARY), weight


@pytest.mark.parametrize("header", ["", "6 3\n"], ids=["GloVe", "word2vec and fastText"])
@pytest.mark.parametrize("end", ["\n", " \n", "\r\n"])
@pytest.mark.parametrize("compressed", [False, True])
def test_the_vectors_of_the_vocabularys_words_are_copied(tmp_path, header, end, compressed):
    path = tmp_path / ("vectors.vec.gz" if compressed else "vectors.txt")
    text = (header + "".join(line + end for line in LINES)).encode()
    path.write_bytes(gzip.compress(text) if compressed else text)
    found, weight = load(path)
    assert found == 3
    assert weight[5].tolist() == [1, 2, 3], "the first of two vectors of a word counts"
    torch.testing.assert_close(weight[4], torch.tensor([0.5, -0.01, 4]))
    assert weight[6].tolist() == [1, 1, 1], "a word with a space"
    assert (weight[[0, 1, 2, 3, 7]] == -1).all(), "special and missing words stay as they are"


@pytest.mark.parametrize(
    "text, message",
    [
        ("5 300\n狗 1 2 3\n", "give --embedding-size 300"),
        ("狗 1 2\n", "give --embedding-size 2"),
        ("9 3\n狗 1 2 3\n", "has 1 of the 9 vectors"),
        ("a 1 2 3\nb 1 2 3\n", "none of the vocabulary's words"),
        ("狗 1 2 3\n男人 1 x 3\n", "not a text file of word vectors"),
        ("", "none of the vocabulary's words"),
        (b"2 3\n\xe7\x8b\x97 \x00\xff\x80\x3f\n", "not a text file of word vectors"),
    ],
)
def test_a_file_of_another_format_is_refused_with_one_line(tmp_path, text, message):
    path = tmp_path / "vectors.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.txt", "truncated.gz", "."])
def test_a_file_that_cannot_be_read_is_refused_with_one_line(tmp_path, name):
    (tmp_path / "truncated.gz").write_bytes(gzip.compress(b"\xe7\x8b\x97 1 2 3\n" * 99)[:-9])
    with pytest.raises(UserError, match="cannot be read|not a text file"):
        load(tmp_path / name)


def test_a_compressed_file_with_one_endless_line_does_not_fill_the_memory(tmp_path):
    (tmp_path / "bomb.vec.gz").write_bytes(gzip.compress(b"1 " * 30_000_000))
    tracemalloc.start()
    with pytest.raises(UserError, match="bomb.vec.gz: its vectors have"):
        load_word_vectors(torch.zeros(8, 3), tmp_path / "bomb.vec.gz", VOCABULARY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000_000  # bytes: one line of a million characters and its half a million fields, not the file
