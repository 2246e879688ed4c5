import os
import subprocess
import sys
import typing
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
from captioning.errors import UserError
from preprocess import tokenizers
from preprocess.tokenizers import TOKENIZERS, default_tokenizer, detect_language, tokenize, tokenize_all

CHINESE = ["两个衣着休闲的人在平整的道路上交谈。", "一个穿红色上衣的男人，站在室外", "", "！？", "在雪地中奔跑的狗"]
texts = st.text(st.characters(), max_size=40) | st.text("aB狗一 .,，。'’-3\u200b\ufe0f❤Ｔ\n", max_size=40)


@pytest.mark.parametrize(
    "caption, words",
    [
        ("A dog, and  a CAT.", "a dog and a cat"),
        ("The man's T-shirt", "the mans t shirt"),
        ('children \'s "toys" & books...', "children s toys books"),
        ("one,two", "one two"),
        ("café №5 — naïve’s", "café 5 naïves"),
        ("tab\tline\nbreak\u00a0space", "tab line break space"),
        ("❤️ 3️⃣ \u200bzero\u200bwidth", "3 zero width"),
        ("一个 长 头发 的 女人，坐着", "一个 长 头发 的 女人 坐着"),
        ("... !! 。", ""),
    ],
)
def test_whitespace_lowers_case_and_removes_punctuation(caption, words):
    # № is a symbol of its own, not a letter
    assert tokenize(caption, "whitespace") == words.split()


@pytest.mark.parametrize(
    "caption, words",
    [
        ("一只狗，在跑。", "一 只 狗 在 跑"),
        ("穿T恤的3个人", "穿 t 恤 的 3 个 人"),
        ("拿着iPhone 6s", "拿 着 iphone 6s"),
        ("全角Ｔ恤１２", "全 角 t 恤 12"),
        ("𠮷野家", "𠮷 野 家"),
    ],
)
def test_character_separates_chinese_characters_and_keeps_other_runs(caption, words):
    assert tokenize(caption, "character") == words.split()


@pytest.mark.parametrize("caption", CHINESE[:2] + CHINESE[4:])
def test_the_jieba_tokenizer_equals_its_precise_mode(caption):
    assert tokenize(caption, "jieba") == [word for word in tokenizers._load_jieba().lcut(caption) if word not in "，。"]


def test_full_width_punctuation_separates_words_for_jieba():
    assert tokenize("人，群", "jieba") == ["人", "群"] != tokenize("人群", "jieba")


def test_full_width_letters_give_the_same_word():
    assert tokenize("穿Ｔ恤的人", "jieba") == tokenize("穿T恤的人", "jieba") == ["穿", "T恤", "的", "人"]


@given(texts, st.sampled_from(sorted(TOKENIZERS)))
def test_words_never_contain_punctuation_spaces_or_line_breaks(caption, tokenizer):
    for word in tokenize(caption, tokenizer):
        assert word and not any(unicodedata.category(character)[0] in "PSZC" for character in word)


@given(texts, st.sampled_from(["whitespace", "character"]))
def test_tokenizing_again_changes_nothing(caption, tokenizer):
    words = tokenize(caption, tokenizer)
    assert tokenize(" ".join(words), tokenizer) == words


@given(texts, st.sampled_from(sorted(TOKENIZERS)))
def test_letters_digits_and_accents_are_kept_in_order(caption, tokenizer):
    """Except full-width ones, which become ordinary ones, and the variation selectors of emoji."""
    caption = "".join(c for c in caption if not unicodedata.decomposition(c).startswith("<wide>"))
    kept = [c for c in caption if unicodedata.category(c) in ("Mn", "Mc") or unicodedata.category(c)[0] in "LN"]
    kept = [c for c in kept if not unicodedata.name(c, "").startswith("VARIATION SELECTOR")]
    assert "".join(tokenize(caption, tokenizer)).casefold() == "".join(kept).casefold().replace(" ", "")


@given(st.lists(texts, max_size=12), st.sampled_from(sorted(TOKENIZERS)))
def test_tokenize_all_equals_tokenize(captions, tokenizer):
    assert list(tokenize_all(captions, tokenizer)) == [tokenize(caption, tokenizer) for caption in captions]


def test_several_processes_give_the_words_of_one_process_in_order(monkeypatch):
    monkeypatch.setattr(tokenizers, "CHUNK_SIZE", 7)
    monkeypatch.setattr(tokenizers, "CAPTIONS_PER_PROCESS", 20)
    used = []
    original = tokenizers._map_in_processes
    monkeypatch.setattr(tokenizers, "_map_in_processes", lambda *rest: used.append(rest[-1]) or original(*rest))
    captions = [caption + str(number) for number, caption in enumerate(CHINESE * 12)]
    assert list(tokenize_all(captions, "jieba", workers=2)) == [tokenize(caption, "jieba") for caption in captions]
    assert used == [2]


def test_few_captions_start_no_process(monkeypatch):
    monkeypatch.setattr(tokenizers, "_map_in_processes", None)
    assert len(list(tokenize_all(CHINESE, "jieba", workers=8))) == len(CHINESE)


def test_a_killed_process_is_a_user_error_and_does_not_hang():
    with pytest.raises(UserError, match="--workers"):
        list(tokenizers._map_in_processes(os._exit, [1, 1, 1], 2))


def test_jieba_is_quiet_even_the_first_time(tmp_path):
    program = "from preprocess.tokenizers import tokenize; print(tokenize('一只狗', 'jieba'))"
    process = subprocess.run(
        [sys.executable, "-X", f"pycache_prefix={tmp_path / 'compiled'}", "-W", "always", "-c", program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TMPDIR": str(tmp_path)},  # without the dictionary of an earlier run
        capture_output=True,
        encoding="utf-8",
    )
    assert process.returncode == 0 and "狗" in process.stdout
    assert not process.stderr


def test_the_language_is_that_of_most_letters():
    assert detect_language(CHINESE) == detect_language(["一个穿T恤的男人在用iPhone"]) == "zh"
    assert detect_language(["A dog runs."]) == detect_language(["A 狗 runs"]) == "en"
    assert detect_language([]) == detect_language(["..."]) == "en"


def test_the_language_is_detected_from_captions_all_over_the_file():
    assert detect_language(["a b"] * 3_000 + ["一只狗在雪地里跑"] * 9_000) == "zh"


def test_each_language_has_a_default_tokenizer():
    assert (default_tokenizer("zh"), default_tokenizer("en")) == ("jieba", "whitespace")


def test_the_command_line_offers_the_registered_tokenizers():
    assert typing.get_args(config.TokenizerName) == tuple(TOKENIZERS) == ("jieba", "whitespace", "character")


@pytest.mark.parametrize("tokenizer", list(TOKENIZERS))
def test_zero_width_spaces_separate_words_and_joiners_do_not(tokenizer):
    assert tokenize("red\u200bdog\ufeff runs", tokenizer) == ["red", "dog", "runs"]
    assert tokenize("do\u200dg", tokenizer) == ["dog"]
