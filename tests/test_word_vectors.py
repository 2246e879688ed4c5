"""Pretrained word vectors, in each format in which they are published, whole, cut and damaged."""

import bz2
import gzip
import io
import lzma
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from captioning.decoders import word_vector_files
from captioning.decoders.word_vectors import load_word_vectors
from captioning.errors import UserError
from preprocess.vocabulary import SPECIAL, Vocabulary

VOCABULARY = Vocabulary("zh", "jieba", 1, (*SPECIAL, "男人", "狗", "new york", "树"))
LINES = ["狗 1 2 3", "the 7 7 7", "男人 0.5 -1e-2 4", "new york 1 1 1", "狗 9 9 9", "<end> 8 8 8"]
COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "txt": bytes}


def load(path, size=3, limit=0):
    """What was found, and the weight (8, size), which is -1 where no vector was copied."""
    weight = torch.full((8, size), -1.0)
    return load_word_vectors(weight, path, VOCABULARY, limit), weight


def load_text(tmp_path, text, **settings):
    path = tmp_path / "vectors.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path, **settings)


def zipped(**members):
    """The bytes of a zip of these texts."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


@pytest.mark.parametrize("header", ["", "6 3\n", "\ufeff", "\ufeff6 3\n"])
@pytest.mark.parametrize("end", ["\n", " \n", "\r\n"])
@pytest.mark.parametrize("compression", [*COMPRESSIONS, "zip"])
def test_the_vectors_of_the_vocabularys_words_are_copied(tmp_path, header, end, compression):
    text = (header + "".join(line + end for line in LINES)).encode()
    data = zipped(text=text) if compression == "zip" else COMPRESSIONS[compression](text)
    path = tmp_path / "an-ending-does-not-count.txt"
    path.write_bytes(data)
    loaded, weight = load(path)
    assert loaded == (3, 0, "")
    assert weight[5].tolist() == [1, 2, 3], "the first of two vectors of a word counts"
    torch.testing.assert_close(weight[4], torch.tensor([0.5, -0.01, 4]))
    assert weight[6].tolist() == [1, 1, 1], "a word with a space"
    assert (weight[[0, 1, 2, 3, 7]] == -1).all(), "special and missing words stay as they are"


@pytest.mark.parametrize(
    "text",
    [
        "狗\t1\t2\t3\n男人\t.5\t-1e-2\t4\n",
        "狗\t1 2 3\n男人\t.5 -1e-2 4\n",
        "狗  1   2 3\n男人   .5 -1e-2  4\n",
        "狗,1,2,3\n男人,.5,-1e-2,4\n",
        '"狗", 1, 2, 3\n"男人", .5, -1e-2, 4\n',
        "2,3\n狗,1,2,3\n男人,.5,-1e-2,4\n",
        "word,d0,d1,d2\n狗,1,2,3\n男人,.5,-1e-2,4\n",
    ],
)
def test_numbers_are_separated_by_spaces_tabs_or_commas(tmp_path, text):
    loaded, weight = load_text(tmp_path, text)
    assert loaded.found == 2 and weight[5].tolist() == [1, 2, 3]
    torch.testing.assert_close(weight[4], torch.tensor([0.5, -0.01, 4]))


def test_a_file_of_ordinary_size_gives_what_numpy_reads(tmp_path):
    words = [f"w{number}" for number in range(300)]
    expected = np.random.default_rng(0).standard_normal((300, 25)).astype(np.float32)
    for separator in " ", ",":
        lines = [separator.join([word, *map(str, row)]) for word, row in zip(words, expected, strict=True)]
        path = tmp_path / "vectors.txt"
        path.write_text("\n".join(lines), "utf-8")
        separated = None if separator == " " else separator
        expected = np.loadtxt(path, np.float32, usecols=range(1, 26), delimiter=separated)
        weight = torch.zeros(304, 25)
        assert load_word_vectors(weight, path, Vocabulary("en", "whitespace", 1, (*SPECIAL, *words))).found == 300
        assert np.array_equal(weight[4:].numpy(), expected)


@pytest.mark.parametrize(
    "bad",
    [
        "男人 1 x 3",
        "男人 1 3",
        "男人 1 nan 3",
        "男人 1 inf 3",
        "男人 1 1e99 3",
        "",
        b"\xe7\x94 1 2 3",
        b"\xff\0\xfe",
        "\ufffd" * 50_000,
    ],
)
def test_a_damaged_line_is_skipped_and_counted(tmp_path, bad):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    loaded, weight = load_text(tmp_path, "狗 1 2 3\n".encode() + bad + "\n男人 4 5 6\ncat 1 1 1\n".encode())
    assert loaded.found == 2 and loaded.damaged == 1 + (len(bad) > 100_000)
    assert weight[4].tolist() == [4, 5, 6]
    assert loaded.report(4).startswith("has vectors of 2 of the vocabulary's 4 words (50.0%); ")


def test_a_file_that_is_mostly_damaged_is_refused(tmp_path):
    with pytest.raises(UserError, match="3 of its 4 lines are damaged; download it again"):
        load_text(tmp_path, "狗 1 2 3\n树 1 2 x\n树 1 2 x\n树 1 2 x\n")


def test_reading_ends_once_all_words_are_found_or_at_the_limit(tmp_path, monkeypatch):
    read = []
    numbers = word_vector_files.VectorLines._word
    monkeypatch.setattr(
        word_vector_files.VectorLines, "_word", lambda self, line: read.append(line) or numbers(self, line)
    )
    words = [f"{word} 1 2 3\n" for word in VOCABULARY.words[4:]]
    assert load_text(tmp_path, "".join(["103 3\n", *words, *["cat 1 2 3\n"] * 99]))[0] == (4, 0, "") and len(read) == 4
    loaded, weight = load_text(tmp_path, "".join(["4 3\n", *words]), limit=3)
    assert loaded == (3, 0, "") and (weight[7] == -1).all()


def test_the_head_of_a_larger_file_serves_and_is_said(tmp_path):
    loaded, weight = load_text(tmp_path, "2000000 3\n狗 1 2 3\n男人 4 5 6.12")
    assert loaded.found == 1 and (weight[4] == -1).all(), "digits of the last number may be missing"
    assert loaded.remark == "; it is a head of 2 vectors of the 2,000,000 that its header announces"
    text = "".join([*(line + "\n" for line in LINES), *(f"{number} {number} 1 1\n" for number in range(9000))]).encode()
    for compress in (gzip.compress, lzma.compress):
        whole = compress(text)
        loaded, _ = load_text(tmp_path, whole[: len(whole) - len(whole) // 5])
        assert loaded.found == 3 and "it is a head of" in loaded.remark, compress


def test_of_a_zip_the_file_with_vectors_of_the_right_size_is_read(tmp_path):
    path = tmp_path / "glove.zip"
    two, three = "狗 1 2\n", "狗 1 2 3\n"
    path.write_bytes(zipped(**{"README": "GloVe", "__MACOSX/._a": three, "g.2d.txt": two, "g.3d.txt": three}))
    assert load(path, 3)[1][5].tolist() == [1, 2, 3] and load(path, 2)[1][5].tolist() == [1, 2]
    with pytest.raises(UserError, match="glove.zip: its vectors have 2 or 3 numbers, not 4; give --embedding-size 2"):
        load(path, 4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("5 300\n狗 1 2 3\n", "give --embedding-size 300"),
        ("狗 1 2\n", "give --embedding-size 2"),
        ("a 1 2 3\nb 1 2 3\n", "none of the vocabulary's words"),
        ("", "not a text file of word vectors"),
        ("<html>\n<p>404\n", "not a text file of word vectors"),
        (b"2 3\n\xe7\x8b\x97 \x00\xff\x80\x3f\n", r"not a text file of word vectors; .*load_word2vec_format\(FILE"),
        (b"PK\3\4 and no more", "cannot be read"),
        (
            gzip.compress(word_vector_files.FASTTEXT_MAGIC + bytes(99), mtime=0),
            "is fastText's .bin, compressed; unpack it",
        ),
        (gzip.compress(b"a 1 2 3\n" * 99, mtime=0)[:30] + bytes(9), "cannot be read"),
    ],
)
def test_a_file_of_another_format_is_refused_with_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        load_text(tmp_path, text)
    assert str(tmp_path / "vectors.txt") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_a_file_that_cannot_be_read_is_refused_with_one_line(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / name)


def test_an_encrypted_zip_is_refused_with_one_line(tmp_path):
    data = bytearray(zipped(text="狗 1 2 3\n"))
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag of encryption in the directory
    with pytest.raises(UserError, match="is encrypted; unpack it"):
        load_text(tmp_path, bytes(data))


def test_a_compressed_file_with_one_endless_line_does_not_fill_the_memory(tmp_path):
    (tmp_path / "bomb.vec.gz").write_bytes(gzip.compress(b"1 " * 10_000_000))
    tracemalloc.start()
    with pytest.raises(UserError, match="bomb.vec.gz: its vectors have"):
        load_word_vectors(torch.zeros(8, 3), tmp_path / "bomb.vec.gz", VOCABULARY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000  # bytes: some pieces of the line and the fields of one, not the file


def test_fasttexts_own_format_is_read_by_its_package(tmp_path):
    fasttext = pytest.importorskip("fasttext", reason="needs the extra [fasttext]")
    text = tmp_path / "text.txt"
    text.write_text("狗 跑 树\n" * 20, "utf-8")
    settings = {"dim": 3, "minCount": 1, "epoch": 1, "minn": 1, "maxn": 2, "bucket": 100, "thread": 1, "verbose": 0}
    model = fasttext.train_unsupervised(str(text), **settings)
    model.save_model(str(tmp_path / "model.bin"))
    loaded, weight = load(tmp_path / "model.bin")
    assert loaded.found == 4, "fastText builds the vectors of words that it never saw from their parts"
    assert np.array_equal(weight[5].numpy(), model.get_word_vector("狗"))
    assert (weight[:4] == -1).all()
    with pytest.raises(UserError, match="its vectors have 3 numbers, not 5; give --embedding-size 3"):
        load(tmp_path / "model.bin", size=5)


def test_without_its_package_fasttexts_format_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[fasttext\]', or give the .vec file"):
        load_text(tmp_path, word_vector_files.FASTTEXT_MAGIC + bytes(20))
