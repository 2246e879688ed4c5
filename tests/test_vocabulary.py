import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.errors import UserError
from preprocess.vocabulary import END, PAD, SPECIAL, START, UNKNOWN, Vocabulary

words = st.sampled_from(["dog", "cat", "a", "狗", "人", *SPECIAL])
captions = st.lists(st.lists(words, max_size=8), max_size=8)


def build(captions, min_count=1, max_words=100, language="en"):
    return Vocabulary.build(
        captions, language=language, tokenizer="whitespace", min_count=min_count, max_words=max_words
    )


def test_the_special_words_come_first():
    assert (PAD, UNKNOWN, START, END) == (0, 1, 2, 3)
    assert build([["dog"]]).words == ("<pad>", "<unk>", "<start>", "<end>", "dog")


def test_frequent_words_come_first_and_ties_are_alphabetical():
    assert build([["b", "c", "a"], ["c"]]).words[4:] == ("c", "a", "b")


def test_a_word_below_the_minimum_count_is_unknown():
    vocabulary = build([["a", "dog"], ["a"]], min_count=2)
    assert vocabulary.encode(["a", "dog"]) == [4, UNKNOWN]


def test_the_size_limit_keeps_the_most_frequent_beside_the_special_words():
    vocabulary = build([["a", "a", "b", "b", "c"]], max_words=2)
    assert vocabulary.words[4:] == ("a", "b") and len(vocabulary) == 6


def test_the_text_of_a_special_word_in_a_caption_is_an_unknown_word():
    vocabulary = build([["the", *SPECIAL, "end"]] * 3)
    assert vocabulary.words[:4] == SPECIAL and len(vocabulary) == 6
    assert vocabulary.encode(SPECIAL) == [UNKNOWN] * 4


@given(captions, st.integers(1, 3), st.integers(1, 6))
def test_the_vocabulary_equals_a_reference_implementation(captions, min_count, max_words):
    counts = Counter(word for caption in captions for word in caption if word not in SPECIAL)
    ranked = sorted(sorted(counts), key=counts.get, reverse=True)
    expected = [word for word in ranked if counts[word] >= min_count][:max_words]
    assert list(build(captions, min_count, max_words).words[4:]) == expected


@given(captions)
def test_words_in_the_vocabulary_survive_encoding_and_decoding(captions):
    vocabulary = build(captions)
    for caption in captions:
        expected = [word if word not in SPECIAL else "<unk>" for word in caption]
        assert vocabulary.decode(vocabulary.encode(caption)) == expected


def test_words_are_joined_as_their_language_or_their_captions_are_written():
    words = ("一只", "狗")
    assert Vocabulary("zh", "jieba", 1, SPECIAL).join(words) == "一只狗"
    assert Vocabulary("zh", "whitespace", 1, SPECIAL).join(words) == "一只 狗", "cut by hand"
    assert build([["dog"]]).join(["a", "dog"]) == "a dog"


def test_a_user_dictionary_survives_saving_and_loading(tmp_path):
    vocabulary = Vocabulary("zh", "jieba", 1, SPECIAL, ("狗绳 3", "遛狗绳"))
    vocabulary.save(tmp_path / "vocab.json")
    assert Vocabulary.load(tmp_path / "vocab.json") == vocabulary == Vocabulary.from_dict(vocabulary.to_dict())


def test_a_vocabulary_survives_saving_and_loading(tmp_path):
    vocabulary = build([["a", "狗", "a"]])
    vocabulary.save(tmp_path / "vocab.json")
    assert Vocabulary.load(tmp_path / "vocab.json") == vocabulary
    assert list(json.loads((tmp_path / "vocab.json").read_bytes())) == ["language", "tokenizer", "min_count", "words"]
    assert [file.name for file in tmp_path.iterdir()] == ["vocab.json"]


def test_a_vocabulary_survives_conversion_to_json_ready_data():
    data = build([["a", "狗"]]).to_dict()
    assert type(data["words"]) is list and json.loads(json.dumps(data)) == data
    assert Vocabulary.from_dict(data) == build([["a", "狗"]])


GOOD = {"language": "en", "tokenizer": "whitespace", "min_count": 5, "words": [*SPECIAL, "dog"]}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"language": "fr"}, "language 'fr' is none of en, zh, ja, th"),
        ({"user_dictionary": "狗绳"}, "user_dictionary a list"),
        ({"user_dictionary": [1], "tokenizer": "jieba"}, "a word is not text"),
        ({"user_dictionary": ["狗绳"]}, "a user dictionary is jieba's, not one of the tokenizer whitespace"),
        ({"tokenizer": ["jieba"]}, "tokenizer"),
        ({"min_count": 0}, "min_count 0"),
        ({"min_count": True}, "min_count True"),
        ({"words": ["dog"]}, "first words"),
        ({"words": []}, "first words"),
        ({"words": "dog"}, "list"),
        ({"words": [*SPECIAL, "dog", "dog"]}, "twice"),
        ({"words": [*SPECIAL, 3]}, "not text"),
        ({"words": [*SPECIAL, ""]}, "empty"),
        ({"size": 9}, "keys"),
    ],
)
def test_a_malformed_vocabulary_is_refused_with_file_and_reason(tmp_path, change, expected):
    file = tmp_path / "vocab.json"
    file.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(UserError) as error:
        Vocabulary.load(file)
    assert str(error.value).startswith(str(file)) and expected in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(UserError, match="python -m preprocess"):
        Vocabulary.load(tmp_path / "vocab.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_a_damaged_file_names_the_command(tmp_path, text):
    (tmp_path / "vocab.json").write_text(text)
    with pytest.raises(UserError, match="python -m preprocess"):
        Vocabulary.load(tmp_path / "vocab.json")
