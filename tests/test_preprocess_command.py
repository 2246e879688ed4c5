import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from captioning.errors import UserError
from captioning.runtime import command_line
from config import Preprocess
from preprocess.__main__ import main
from preprocess.annotations import Record
from preprocess.captions import read_captions, read_texts
from preprocess.languages import default_tokenizer
from preprocess.vocabulary import UNKNOWN, Vocabulary

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data sets in ../shared")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def annotations(images, captions, name="ann.json", missing=()):
    """An AI Challenger file {id: captions}, with an empty photo for each id that is not missing."""
    for id in captions.keys() - set(missing):
        (images / id).touch()
    file = images.parent / name
    file.write_text(json.dumps([{"image_id": id, "caption": texts} for id, texts in captions.items()]), "utf-8")
    return file, images


def preprocess(data, **settings):
    main(Preprocess(data, **{"workers": 1, "min_count": 1, **settings}))
    return list(read_captions(data)), Vocabulary.load(data / "vocab.json")


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}


def many(photos, caption="a dog runs"):
    return {f"{number}.jpg": [f"{caption} {number}"] for number in range(photos)}


def test_both_files_are_written_and_nothing_else(tmp_path, images):
    train = annotations(images, {"1.jpg": ["A dog.", "The dog!"], "2.jpg": ["A cat"]})
    val = annotations(images, {"3.jpg": ["A bird"]}, "val.json")
    photos, vocabulary = preprocess(tmp_path / "data", train=train, val=val)
    assert [(photo.id, photo.split, photo.captions) for photo in photos] == [
        ("1.jpg", "train", (("a", "dog"), ("the", "dog"))),
        ("2.jpg", "train", (("a", "cat"),)),
        ("3.jpg", "val", (("a", "bird"),)),
    ]
    assert photos[0].image == str(images / "1.jpg")
    assert vocabulary.words[4:] == ("a", "dog", "cat", "the")
    assert sorted(contents(tmp_path / "data")) == ["captions.jsonl", "texts.jsonl", "vocab.json"]
    assert read_texts(tmp_path / "data", ["3.jpg", "1.jpg"]) == {"1.jpg": ("A dog.", "The dog!"), "3.jpg": ("A bird",)}


def test_a_word_seen_only_in_val_is_unknown(tmp_path, images):
    train = annotations(images, {"1.jpg": ["a dog"]})
    val, test = ({f"{split}.jpg": ["a bird a bird"]} for split in ("val", "test"))
    files = {"val": annotations(images, val, "val.json"), "test": annotations(images, test, "test.json")}
    _, vocabulary = preprocess(tmp_path / "data", train=train, **files)
    assert vocabulary.encode(["bird"]) == [UNKNOWN]


def test_without_val_a_tenth_of_train_chosen_by_hash_becomes_val(tmp_path, images):
    photos, _ = preprocess(tmp_path / "data", train=annotations(images, many(600)))
    val = {photo.id for photo in photos if photo.split == "val"}
    first_bytes = {id: hashlib.sha256(id.encode()).digest()[0] for id in many(600)}
    assert {id for id, byte in first_bytes.items() if byte < 25} <= val <= {id for id in val if first_bytes[id] <= 25}
    assert 40 < len(val) < 80


def test_the_held_out_tenth_stays_when_photos_are_added(tmp_path, images):
    few, _ = preprocess(tmp_path / "few", train=annotations(images, many(300)))
    more, _ = preprocess(tmp_path / "more", train=annotations(images, dict(reversed(many(600).items()))))
    splits = {photo.id: photo.split for photo in more}
    assert all(splits[photo.id] == photo.split for photo in few)


def test_of_two_photos_one_is_train_and_one_is_val(tmp_path, images):
    photos, _ = preprocess(tmp_path / "data", train=annotations(images, many(2)))
    assert sorted(photo.split for photo in photos) == ["train", "val"]


def test_a_single_photo_is_refused(tmp_path, images):
    with pytest.raises(UserError, match="train is empty"):
        preprocess(tmp_path / "data", train=annotations(images, many(1)))
    assert contents(tmp_path / "data") == {}


def test_an_image_in_two_splits_is_refused(tmp_path, images):
    train = annotations(images, many(3))
    with pytest.raises(UserError, match=r"0.jpg: the same photo is in train .* and in test"):
        preprocess(tmp_path / "data", train=train, test=train)


def test_chinese_is_detected_and_tokenized_by_jieba(tmp_path, images):
    train = annotations(images, {"1.jpg": ["一个穿T恤的男人，在跑。"]})
    val = annotations(images, {"2.jpg": ["一只狗"]}, "val.json")
    photos, vocabulary = preprocess(tmp_path / "data", train=train, val=val)
    assert photos[0].captions == (("一个", "穿", "t恤", "的", "男人", "在", "跑"),)
    assert (vocabulary.language, vocabulary.tokenizer) == ("zh", "jieba")


@pytest.mark.parametrize("language, word, rare, times", [("zh", "狗", "猫", 2), ("en", "dog", "cat", 5)])
def test_the_minimum_count_is_two_in_chinese_and_five_in_english(tmp_path, images, language, word, rare, times):
    train = annotations(images, {"1.jpg": [word] * times + [rare] * (times - 1)})
    val = annotations(images, {"2.jpg": [rare]}, "val.json")
    tokenizer = default_tokenizer(language)  # given, single words are accepted
    _, vocabulary = preprocess(tmp_path / "data", train=train, val=val, min_count=None, tokenizer=tokenizer)
    assert vocabulary.words[4:] == (word,) and vocabulary.language == language


def test_a_given_language_and_tokenizer_are_used(tmp_path, images):
    train = annotations(images, {"1.jpg": ["一只 狗"], "2.jpg": ["一只 猫"]})
    photos, vocabulary = preprocess(tmp_path / "data", train=train, language="en", tokenizer="character")
    assert (vocabulary.language, vocabulary.tokenizer) == ("en", "character")
    assert photos[0].captions == (("一", "只", "狗"),)


def test_captions_without_words_are_left_out_and_counted(tmp_path, images, capsys):
    captions = {**many(30), "x.jpg": ["", "...", "a cat"], "y.jpg": ["!"]}
    photos, _ = preprocess(tmp_path / "data", train=annotations(images, captions))
    found = {photo.id: photo.captions for photo in photos}
    assert found["x.jpg"] == (("a", "cat"),) and "y.jpg" not in found and len(found) == 31
    assert "3 captions without words, and 1 photos that have no other caption" in capsys.readouterr().out


def test_too_many_missing_photos_are_refused_with_the_first_and_the_flag(tmp_path, images):
    train = annotations(images, many(10), missing=["3.jpg", "7.jpg", "9.jpg"])
    with pytest.raises(UserError, match=r"3\.jpg: .*3 of 10 .*--allow-missing 0\.3") as error:
        preprocess(tmp_path / "data", train=train, allow_missing=0.2)
    assert "\n" not in str(error.value) and not (tmp_path / "data").exists()


def test_few_missing_photos_are_left_out_and_counted(tmp_path, images, capsys):
    train = annotations(images, many(10), missing=["3.jpg", "7.jpg", "9.jpg"])
    photos, _ = preprocess(tmp_path / "data", train=train, allow_missing=0.3)
    assert len(photos) == 7 and "3 photos missing" in capsys.readouterr().out


def test_a_folder_and_a_broken_link_count_as_missing_photos(tmp_path, images):
    train = annotations(images, many(10), missing=["3.jpg", "7.jpg"])
    (images / "3.jpg").mkdir()
    (images / "7.jpg").symlink_to("nowhere")
    photos, _ = preprocess(tmp_path / "data", train=train, allow_missing=1)
    assert len(photos) == 8


def test_running_the_same_command_again_changes_nothing(tmp_path, images):
    train = annotations(images, many(40))
    preprocess(tmp_path / "data", train=train)
    before = contents(tmp_path / "data")
    preprocess(tmp_path / "data", train=train)
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("settings", [{"min_count": 30}, {"max_words": 2}, {"language": "zh"}])
def test_a_different_result_requires_overwrite(tmp_path, images, settings):
    train = annotations(images, many(40))
    preprocess(tmp_path / "data", train=train)
    before = contents(tmp_path / "data")
    with pytest.raises(UserError, match="--overwrite"):
        preprocess(tmp_path / "data", train=train, **settings)
    assert contents(tmp_path / "data") == before
    preprocess(tmp_path / "data", train=train, **settings, overwrite=True)
    assert contents(tmp_path / "data") != before


def test_a_kill_while_files_are_replaced_leaves_no_captions_with_the_vocabulary_of_others(
    tmp_path, images, monkeypatch
):
    preprocess(tmp_path / "data", train=annotations(images, many(40)))
    replace = os.replace

    def kill_after_the_vocabulary(source, target):
        replace(source, target)
        if Path(target) == tmp_path / "data" / "vocab.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", kill_after_the_vocabulary)
    other = annotations(images, many(40, "a cat sleeps"), "other.json")
    with pytest.raises(KeyboardInterrupt):
        preprocess(tmp_path / "data", train=other, overwrite=True)
    assert "cat" in Vocabulary.load(tmp_path / "data" / "vocab.json").words
    assert not (tmp_path / "data" / "captions.jsonl").exists()
    monkeypatch.undo()
    photos, _ = preprocess(tmp_path / "data", train=other)
    assert photos[0].captions[0][:3] == ("a", "cat", "sleeps"), "without --overwrite: nothing is replaced"


def test_a_vocabulary_without_words_is_refused(tmp_path, images):
    with pytest.raises(UserError, match="--min-count"):
        preprocess(tmp_path / "data", train=annotations(images, many(9)), min_count=99)


def test_captions_that_the_tokenizer_does_not_split_are_refused_with_its_flag(tmp_path, images):
    train = annotations(images, {f"{i}.jpg": [f"一个男人和两只狗在草地上跑{i}"] for i in range(9)})
    with pytest.raises(
        UserError, match="most captions are a single long word: .* whitespace .* --tokenizer jieba or character$"
    ):
        preprocess(tmp_path / "data", train=train, tokenizer="whitespace")


def test_captions_of_a_single_word_are_refused_unless_their_tokenizer_is_given(tmp_path, images):
    train = annotations(images, {f"{i}.jpg": ["dog", "dogs", "two dogs"] for i in range(9)})
    with pytest.raises(UserError, match="--tokenizer character, or --tokenizer whitespace if they are to be single"):
        preprocess(tmp_path / "data", train=train)
    photos, _ = preprocess(tmp_path / "data", train=train, tokenizer="whitespace")
    assert len(photos) == 9
    short = annotations(images, {f"{i}.jpg": ["红色汽车"] for i in range(9)})
    with pytest.raises(UserError, match="single long word"):
        preprocess(tmp_path / "short", train=short, tokenizer="whitespace")


def test_captions_cut_by_hand_keep_their_cuts_unless_a_tokenizer_is_given(tmp_path, images, capsys):
    train = annotations(images, {"1.jpg": ["一只 小 狗 在 草地 上"], "2.jpg": ["两个 男 人 在 奔跑"]})
    photos, vocabulary = preprocess(tmp_path / "data", train=train)
    assert photos[0].captions == (("一只", "小", "狗", "在", "草地", "上"),)
    assert (vocabulary.language, vocabulary.tokenizer) == ("zh", "whitespace")
    assert "cut by spaces, which are kept" in capsys.readouterr().out
    photos, vocabulary = preprocess(tmp_path / "again", train=train, tokenizer="jieba")
    assert vocabulary.tokenizer == "jieba"


def test_a_user_dictionary_is_kept_in_the_vocabulary_and_cuts_captions(tmp_path, images):
    (tmp_path / "words.txt").write_text("遛狗绳 20\n", "utf-8")
    train = annotations(images, {"1.jpg": ["一只狗在遛狗绳边"], "2.jpg": ["一个遛狗绳"]})
    photos, vocabulary = preprocess(tmp_path / "data", train=train, user_dict=tmp_path / "words.txt")
    assert "遛狗绳" in photos[0].captions[0] and vocabulary.user_dictionary == ("遛狗绳 20",)
    assert vocabulary.tokenize("遛狗绳边") == ["遛狗绳", "边"]


def test_texts_of_captions_in_another_language_are_removed(tmp_path, images):
    preprocess(tmp_path / "data", train=annotations(images, many(9)))
    chinese = annotations(images, many(9, "一只狗"), "zh.json")
    preprocess(tmp_path / "data", train=chinese, overwrite=True)
    assert sorted(contents(tmp_path / "data")) == ["captions.jsonl", "vocab.json"]


def test_the_summary_has_the_right_figures(tmp_path, images, capsys):
    train = annotations(images, {"1.jpg": ["a a a dog"], "2.jpg": ["a a"] * 8 + ["a cat bird"]})
    val = annotations(images, {"3.jpg": ["a fox is a fox"]}, "val.json")
    preprocess(tmp_path / "data", train=train, val=val, max_words=2)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "train 2 10 2 3 4 4 8.70 %" in lines  # 2 of 23 words: bird is in the vocabulary, cat and dog are not
    assert "val 1 1 5 5 5 5 60.00 %" in lines
    assert "vocabulary: 2 words, without 0 that occur fewer than 1 times in train and 2 beyond --max-words 2" in lines


def test_scenes_are_preprocessed_like_annotations(tmp_path, monkeypatch):
    def draw_scenes(folder, count, language, seed, scene_set):
        (folder / "photos").mkdir(parents=True)
        (folder / "photos" / "0.png").touch()
        captions = (f"一个{language}圆。",)
        return [Record(str(folder / "photos" / "0.png"), f"{count} {seed} {scene_set}", "train", captions)]

    monkeypatch.setitem(sys.modules, "preprocess.scenes", SimpleNamespace(draw_scenes=draw_scenes))
    photos, vocabulary = preprocess(tmp_path / "data", scenes=12, seed=3, tokenizer="character", scene_set="relations")
    assert photos[0].id == "12 3 relations" and photos[0].captions == (("一", "个", "zh", "圆"),)
    assert vocabulary.language == "zh"


def test_a_data_folder_that_cannot_be_created_is_a_user_error(tmp_path, images, monkeypatch, capsys):
    annotations_file, folder = annotations(images, many(20))
    command = ["preprocess", str(annotations_file), "--train", str(annotations_file), str(folder)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"^error: .*ann\.json: cannot be written"):
        command_line.run(Preprocess, main)


@needs_shared
def test_missing_photos_of_real_coco_are_reported_and_can_be_left_out(tmp_path):
    coco = SHARED / "coco_mini"
    files = (coco / "annotations" / "captions_val2017_full.json", coco / "val2017")
    with pytest.raises(UserError, match="4,841 of 5,000"):
        preprocess(tmp_path / "data", train=files)
    photos, vocabulary = preprocess(tmp_path / "data", train=files, allow_missing=1)
    assert len(photos) == 159 and vocabulary.language == "en"


@needs_shared
def test_the_languages_of_real_captions_are_detected(tmp_path):
    flickr = SHARED / "flickr8k"
    chinese = flickr / "caption_val_annotations_zh.json", flickr / "images"
    photos, vocabulary = preprocess(tmp_path / "zh", train=chinese)
    assert len(photos) == 1_000 and vocabulary.tokenizer == "jieba"
    english = flickr / "dataset_flickr8k.json", flickr / "images"
    photos, vocabulary = preprocess(tmp_path / "en", karpathy=english)
    assert len(photos) == 7_000 and vocabulary.tokenizer == "whitespace"
