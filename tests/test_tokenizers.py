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
from preprocess.languages import LANGUAGES, default_tokenizer, detect_language, is_cut_by_hand
from preprocess.tokenizers import TOKENIZERS, tokenize, tokenize_all
from preprocess.user_dictionary import read_user_dictionary

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
    assert tokenize("穿Ｔ恤的人", "jieba") == tokenize("穿T恤的人", "jieba") == ["穿", "t恤", "的", "人"]


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


JAPANESE = ["男の人がTシャツを着て、公園でスケートボードをしている。", "赤い車"]
THAI = ["ผู้ชายกำลังเล่นสเก็ตบอร์ดในสวนสาธารณะ", "หมาสีดำ 2 ตัว"]


def test_the_language_is_that_of_most_letters():
    assert detect_language(CHINESE) == detect_language(["一个穿T恤的男人在用iPhone", "可爱の猫"]) == "zh"
    assert detect_language(["A dog runs."]) == detect_language(["A 狗 runs"]) == detect_language(["A の dog"]) == "en"
    assert detect_language([]) == detect_language(["..."]) == "en"
    assert (detect_language(JAPANESE), detect_language(THAI)) == ("ja", "th")


def test_the_language_is_detected_from_captions_all_over_the_file():
    assert detect_language(["a b"] * 3_000 + ["一只狗在雪地里跑"] * 9_000) == "zh"


def test_each_language_has_a_default_tokenizer():
    assert [default_tokenizer(language) for language in ("zh", "en", "ja", "th")] == [
        "jieba",
        "whitespace",
        "fugashi",
        "pythainlp",
    ]


def test_the_command_line_offers_the_registered_tokenizers_and_languages():
    names = ("jieba", "whitespace", "character", "fugashi", "pythainlp")
    assert typing.get_args(config.TokenizerName) == tuple(TOKENIZERS) == names
    assert typing.get_args(config.LanguageName) == tuple(LANGUAGES)


def test_japanese_and_thai_are_split_into_words():
    expected = "男 の 人 が t シャツ を 着 て 公園 で スケートボード を し て いる"
    assert tokenize(JAPANESE[0], "fugashi") == expected.split()
    assert tokenize(THAI[0], "pythainlp") == ["ผู้ชาย", "กำลัง", "เล่น", "สเก็ต", "บอร์ด", "ใน", "สวนสาธารณะ"]
    assert tokenize(THAI[1], "pythainlp") == ["หมา", "สี", "ดำ", "2", "ตัว"]


@pytest.mark.parametrize("tokenizer, package", [("fugashi", "fugashi"), ("pythainlp", "pythainlp.tokenize.newmm")])
def test_without_its_package_a_tokenizer_says_how_to_get_it(tokenizer, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    getattr(tokenizers, f"_load_{tokenizer}").cache_clear()
    with pytest.raises(UserError, match=rf"--tokenizer {tokenizer}: .* pip install 'kantu\[(ja|th)\]'$"):
        tokenize("a", tokenizer)


@pytest.mark.parametrize("tokenizer", list(TOKENIZERS))
def test_zero_width_characters_separate_words(tokenizer):
    assert (
        tokenize("red\u200bdog\ufeff runs\u2060on\u200dthe\u200cgrass", tokenizer)
        == "red dog runs on the grass".split()
    )


def test_joiners_in_scripts_that_write_with_them_do_not_end_a_word():
    assert tokenize("می\u200cخواهم क\u094d\u200dष", "whitespace") == ["میخواهم", "क\u094dष"]


@pytest.mark.parametrize("tokenizer", list(TOKENIZERS))
def test_every_tokenizer_lowers_the_case(tokenizer):
    assert tokenize("NIKE", tokenizer) == ["nike"]


def test_jieba_knows_its_words_with_latin_letters_in_any_case():
    assert tokenize("穿T恤的人", "jieba") == tokenize("穿t恤的人", "jieba") == ["穿", "t恤", "的", "人"]
    assert tokenizers.jieba_cut("T恤") == ["T恤"], "the published jieba is left as it is, for AI Challenger's scores"


# ---- captions that are cut by hand


@pytest.mark.parametrize(
    "captions, language, cut",
    [
        (["一只 狗 在 草地 上 奔跑", "两 个 人"], "zh", True),
        (["一只狗在草地上奔跑", "两个人"], "zh", False),
        (["穿着NIKE 上衣的男人在跑 道上奔跑", "拿着 iPhone 的女人站在房间里面"], "zh", False),
        (["หมา สีดำ 2 ตัว"], "th", True),
        (["ผู้ชายกำลังเล่นสเก็ตบอร์ด ในสวนสาธารณะ"], "th", False),
        (["a dog"], "en", False),
        ([], "zh", False),
    ],
)
def test_captions_are_cut_by_hand_if_their_pieces_are_as_short_as_words(captions, language, cut):
    assert is_cut_by_hand(captions, language) is cut


# ---- user dictionaries


def test_a_user_dictionary_makes_words_that_jieba_does_not_know(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("\ufeff全地形车\n\n遛狗绳 20 n\nVR眼镜\t3\n遛狗绳 30\n", "utf-8")
    entries = read_user_dictionary(file)
    assert entries == ("全地形车", "遛狗绳 30", "vr眼镜 3")
    caption = "全地形车和Vr眼镜在遛狗绳边"
    assert tokenize(caption, "jieba", entries) == ["全地形车", "和", "vr眼镜", "在", "遛狗绳", "边"]
    assert "全地形车" not in tokenize(caption, "jieba"), "a dictionary does not change jieba for others"
    assert list(tokenize_all([caption], "jieba", 1, entries)) == [tokenize(caption, "jieba", entries)]


def test_a_user_dictionary_gives_the_words_of_jiebas_own_loader(tmp_path):
    jieba = tokenizers._load_jieba()
    file = tmp_path / "words.txt"
    file.write_text("全地形车\n遛狗绳 20 n\n黑白花\n", "utf-8")
    theirs = jieba.Tokenizer()
    theirs.FREQ, theirs.total, theirs.initialized = dict(jieba.dt.FREQ), jieba.dt.total, True
    theirs.load_userdict(str(file))
    for caption in ("黑白花的狗和遛狗绳", "全地形车上的人", *CHINESE):
        expected = [word for word in theirs.cut(caption) if word not in "，。！？"]
        assert tokenize(caption, "jieba", read_user_dictionary(file)) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("\n \n", "words.txt: holds no words; give a word a line"),
        ("阿诺·施瓦辛格\n", "words.txt: holds no words"),
        ("狗绳 0\n", "words.txt:1: a frequency must be at least 1"),
    ],
)
def test_a_user_dictionary_without_words_is_refused_in_one_line(text, message, tmp_path):
    (tmp_path / "words.txt").write_text(text, "utf-8")
    with pytest.raises(UserError, match=message):
        read_user_dictionary(tmp_path / "words.txt")


def test_words_that_no_caption_can_have_are_left_out_of_a_user_dictionary_aloud(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("阿诺·施瓦辛格\n狗绳\n", "utf-8")
    assert read_user_dictionary(tmp_path / "words.txt") == ("狗绳",)
    assert "1 words are left out, since captions lose their punctuation: 阿诺·施瓦辛格" in capsys.readouterr().out


def test_a_user_dictionary_with_another_tokenizer_is_refused():
    with pytest.raises(UserError, match="--user-dict: is a dictionary of jieba, but the tokenizer is character"):
        tokenize("狗", "character", ("狗绳",))
