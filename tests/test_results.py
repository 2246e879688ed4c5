"""Caption files have the formats of COCO and AI Challenger; other files are read, or refused with one line."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import generate
from captioning.caption import CaptionResult
from captioning.errors import UserError
from captioning.evaluation.results import (
    References,
    read_reference_photos,
    read_results,
    write_coco,
    write_csv,
    write_submission,
)
from captioning.evaluation.score_report import score_captions
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from preprocess.vocabulary import SPECIAL, VOCABULARY_FILE, Vocabulary


def make_photo(id, *captions, image=None):
    return Photo(image or f"photos/{id}", id, "val", tuple(tuple(words.split()) for words in captions))


PAIRS = [
    (make_photo("9", "a dog"), CaptionResult("a dog", ["a", "dog"], -1.23456, True)),
    (make_photo("b.jpg", "cats"), CaptionResult("", [], -2.0, False, sentinel=[])),
]


def english(photos):
    return References(photos, "en", "whitespace")


def write(path, data):
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")
    return path


def test_written_results_can_be_read(tmp_path):
    write_coco(tmp_path / "a.json", PAIRS)
    lines = json.loads((tmp_path / "a.json").read_text())
    assert lines[0] == {"image_id": "9", "caption": "a dog", "log_probability": -1.2346, "finished": True}
    found = read_results(tmp_path / "a.json", english([photo for photo, _ in PAIRS]))
    assert [(p.id, c.words, c.finished) for p, c in found] == [("9", ["a", "dog"], True), ("b.jpg", [], False)]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
caption = st.builds(
    lambda text, log_probability, finished: CaptionResult(text, text.split(), log_probability, finished),
    text,
    st.floats(-99, 0),
    st.booleans(),
)


@given(captions=st.dictionaries(text.filter(bool) | st.integers(0, 10**20).map(str), caption, min_size=1, max_size=5))
def test_written_results_can_be_read_whatever_their_ids_and_captions(tmp_path_factory, captions):
    path = tmp_path_factory.mktemp("results") / "a.json"
    pairs = [(make_photo(id, image=f"photos/{i}.jpg"), caption) for i, (id, caption) in enumerate(captions.items())]
    write_coco(path, pairs)
    found = read_results(path, english([photo for photo, _ in pairs]))
    assert [(photo.id, caption.text, caption.finished) for photo, caption in found] == [
        (id, caption.text, caption.finished) for id, caption in captions.items()
    ]


def test_a_submission_has_the_form_of_the_challenges_own_sample(tmp_path, shared):
    sample = json.loads((shared / "ai_challenger/id_to_test_caption.json").read_text("utf-8"))
    pairs = [(make_photo(line["image_id"] + ".jpg"), CaptionResult(" ".join(line["caption"]), [])) for line in sample]
    write_submission(tmp_path / "a.json", pairs)
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == sample
    references = read_reference_photos(shared / "ai_challenger/id_to_words.json", "val")
    captions = {found.image: caption.text for found, caption in read_results(tmp_path / "a.json", references)}
    assert captions == {line["image_id"]: line["caption"] for line in sample}


def test_a_submission_has_no_empty_caption_and_no_repeated_name(tmp_path):
    write_submission(tmp_path / "a.json", PAIRS)
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))[1] == {"image_id": "b", "caption": "。"}
    with pytest.raises(UserError, match="2 photos are named b without folder and suffix"):
        write_submission(tmp_path / "b.json", [*PAIRS, (make_photo("folder/b.PNG"), CaptionResult("x", ["x"]))])
    assert not (tmp_path / "b.json").exists()


def test_a_csv_table_keeps_commas_quotes_and_chinese_in_a_spreadsheet(tmp_path):
    pairs = [
        (make_photo('a,"b".jpg'), CaptionResult("狗, cat", ["狗"], -1.5, True)),
        (make_photo("c"), CaptionResult("x", ["x"])),
    ]
    write_csv(tmp_path / "a.csv", pairs, np.arange(12).reshape(2, 6))
    assert (tmp_path / "a.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    with open(tmp_path / "a.csv", encoding="utf-8-sig", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["photo"], first["caption"], first["log_probability"], first["CIDEr-D"]) == (
        'a,"b".jpg',
        "狗, cat",
        "-1.5000",
        "5.00",
    )
    assert second["log_probability"] == second["finished"] == ""
    write_csv(tmp_path / "b.csv", pairs, None)
    assert (tmp_path / "b.csv").read_text("utf-8-sig").splitlines()[0] == "photo,caption,log_probability,finished"


def test_ids_are_written_as_integers_if_all_of_them_are(tmp_path):
    for ids, written in ((["9", "0"], [9, 0]), (["9", "09"], ["9", "09"]), (["9", "b.jpg"], ["9", "b.jpg"])):
        write_coco(tmp_path / "a.json", [(make_photo(id), CaptionResult("a", ["a"], -1.0, True)) for id in ids])
        assert [line["image_id"] for line in json.loads((tmp_path / "a.json").read_text())] == written


@pytest.mark.parametrize(
    "name, id, way",
    [
        (9, "9", "id"),
        ("000000000009", "9", "file name without its ending"),
        ("0009", "9", "number"),
        ("COCO_val2014_000000000009.jpg", "9", "number"),
        ("000000000009.jpg", "9", "file name"),
        ("/elsewhere/val2017/000000000009.jpg", "9", "end of the path"),
        ("D:\\coco\\val2017\\000000000009.jpg", "9", "end of the path"),
        ("/elsewhere/000000000009.jpg", "9", "file name"),
        ("b/1.jpg", "b/1.jpg", "id"),
        ("data/b/1.jpg", "b/1.jpg", "end of the path"),
        ("x/b/1", "b/1.jpg", "end of the path"),
        (77, "0077", "number"),
        (500, "500", "id"),
        (7, None, None),
        ("1.jpg", None, "a/1.jpg and b/1.jpg"),
        ("c/1.jpg", None, "a/1.jpg and b/1.jpg"),
        ("c/2.jpg", None, None),
        ("9.5", None, None),
    ],
)
def test_an_image_id_may_be_the_id_the_number_the_file_name_or_the_end_of_the_path(tmp_path, capsys, name, id, way):
    photos = [make_photo("9", image="/data/val2017/000000000009.jpg"), make_photo("a/1.jpg"), make_photo("b/1.jpg")]
    photos += [
        make_photo("0077"),
        make_photo("77_7.jpg"),
        make_photo("500", image="0600.jpg"),
        make_photo("6", image="500.jpg"),
    ]
    path = write(tmp_path / "a.json", [{"image_id": name, "caption": "a"}])
    if id is None:
        fit = "1 of 1 image_ids fit several photos" if way else "1 of 1 image_ids fit no photo"
        with pytest.raises(UserError, match=f"{fit}: {name}; give the references"):
            read_results(path, english(photos))
        return
    assert [photo.id for photo, _ in read_results(path, english(photos))] == [id]
    assert capsys.readouterr().out == f"{path}: image_ids were found by {way}\n"


def test_all_image_ids_that_fit_no_photo_are_listed_in_the_message_or_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = [f"unknown{number}" for number in range(900)]
    for count in (3, 900):
        lines = [{"image_id": name, "caption": "a"} for name in ["9", *unknown[:count]]]
        with pytest.raises(UserError, match=f"{count} of {count + 1} image_ids fit no photo: unknown0, ") as error:
            read_results(write(tmp_path / "a.json", lines), english([PAIRS[0][0]]))
        assert len(str(error.value)) < 1500 and "(ids of the references are such as 9)" in str(error.value)
        listed = (
            Path("a.fit_no_photo.txt").read_text(encoding="utf-8").splitlines() if count == 900 else str(error.value)
        )
        assert all(name in listed for name in unknown[:count])


def test_photos_of_a_folder_get_the_ids_of_cocos_list_of_images(tmp_path):
    info = write(
        tmp_path / "image_info_test2017.json",
        {"images": [{"file_name": "01.jpg", "id": 1}, {"file_name": "2.jpg", "id": 2}]},
    )
    photos = [Photo(f"test2017/{name}.jpg", f"test2017/{name}.jpg", "", ()) for name in ("2", "01")]
    assert [photo.id for photo in generate.with_ids(photos, info)] == ["2", "1"]
    with pytest.raises(UserError, match="1 of 2 photos fit no image: test2017/3.jpg; give the file of this folder"):
        generate.with_ids([photos[0], Photo("test2017/3.jpg", "x", "", ())], info)
    with pytest.raises(UserError, match="2 of the photos have the id 2; give each photo once"):
        generate.with_ids([photos[0], Photo("copy/2.jpg", "x", "", ())], info)
    for data in ([], {"images": []}, {"images": [{"id": 1}]}, {"images": 2 * [{"id": 1, "file_name": "a"}]}):
        with pytest.raises(UserError, match="image_info.*: (image . has no file_name|has no list of images)"):
            generate.with_ids(photos, write(info, data))


def test_a_photo_may_be_named_by_its_id_or_by_an_unambiguous_file_name(tmp_path):
    photos = [make_photo("1", image="a/000001.jpg"), make_photo("x.jpg"), make_photo("x/y.jpg"), make_photo("z/y.jpg")]
    lines = [{"image_id": name, "caption": "a"} for name in ("000001", "x", "x/y.jpg")]
    found = read_results(write(tmp_path / "a.json", lines), english(photos))
    assert [p.id for p, _ in found] == ["1", "x.jpg", "x/y.jpg"]
    with pytest.raises(UserError, match="1 of 1 image_ids fit several photos: y; give"):
        read_results(write(tmp_path / "b.json", [{"image_id": "y", "caption": "a"}]), english(photos))
    with pytest.raises(UserError, match="under two names"):
        lines = [{"image_id": 1, "caption": "a"}, {"image_id": "000001", "caption": "b"}]
        read_results(write(tmp_path / "c.json", lines), english(photos))


@pytest.mark.parametrize(
    "data, reason",
    [
        ({"caption": "a"}, "no list of captions"),
        ([], "no list of captions"),
        (["a"], "entry 0 is not like"),
        ([{"image_id": 9}], "entry 0"),
        ([{"image_id": 9, "caption": ["a"]}], "entry 0"),
        ([{"image_id": True, "caption": "a"}], "entry 0"),
        ([{"image_id": 9, "caption": "a", "finished": 1}], "entry 0"),
        ([{"image_id": 9, "caption": "a"}, {"image_id": "9", "caption": "b"}], "image_id 9 occurs twice"),
        ([{"image_id": 7, "caption": "a"}], "1 of 1 image_ids fit no photo: 7"),
    ],
)
def test_a_file_without_a_valid_list_of_captions_is_refused_in_one_line(tmp_path, data, reason):
    with pytest.raises(UserError, match=reason) as error:
        read_results(write(tmp_path / "a.json", data), english([PAIRS[0][0]]))
    assert "\n" not in str(error.value)


def test_references_of_a_data_folder_keep_their_tokens(tmp_path):
    write_captions(tmp_path / CAPTIONS_FILE, [make_photo("1", "a dog", "dogs"), Photo("2", "2", "train", (("a",),))])
    Vocabulary.build([["a"]], language="en", tokenizer="whitespace", min_count=1, max_words=9).save(
        tmp_path / VOCABULARY_FILE
    )
    found = read_reference_photos(tmp_path, "val")
    assert found.photos[0].captions == (("a", "dog"), ("dogs",))
    assert (found.language, found.tokenizer, found.texts) == ("en", "whitespace", None)
    with pytest.raises(UserError, match="--tokenizer requires an annotation file"):
        read_reference_photos(tmp_path, "val", "jieba")
    with pytest.raises(UserError, match="--user-dict requires an annotation file"):
        read_reference_photos(tmp_path, "val", None, ("狗绳",))


def test_references_of_an_annotation_file_are_tokenized_unless_they_are_already(tmp_path):
    def read(captions, tokenizer=None, user_dictionary=()):
        path = write(tmp_path / "a.json", [{"image_id": "a.jpg", "caption": captions}])
        return read_reference_photos(path, "val", tokenizer, user_dictionary).photos

    assert read(["A dog.", "。"])[0].captions == (("a", "dog"),)
    assert read(["两只小狗在草地上", "狗"])[0].captions[0] == ("两只", "小狗", "在", "草地", "上")
    assert read(["两只小狗 在草地上", "小 狗"])[0].captions[0] == ("两只小狗", "在草地上")
    assert read(["两只小狗"], "character")[0].captions[0] == tuple("两只小狗")
    assert read(["遛狗绳在草地上"], None, ("遛狗绳",))[0].captions[0] == ("遛狗绳", "在", "草地", "上")
    assert read(["。"]) == []


# ---- captions that are cut by hand

# jieba would make words of 小狗, 男人 and 奔跑, and two words of 两只小狗 and 草地上
BY_HAND = ["一只 小 狗 在 草地 上", "两个 男 人 在 奔 跑", "两只小狗 在 草地上 玩"]


def hand_cut_data(folder):
    """A data set whose captions were cut by hand; its photos, and its vocabulary."""
    photos = [make_photo(f"{i}.jpg", words) for i, words in enumerate(BY_HAND)]
    write_captions(folder / CAPTIONS_FILE, photos)
    captions = [words for photo in photos for words in photo.captions]
    vocabulary = Vocabulary.build(captions, language="zh", tokenizer="whitespace", min_count=1, max_words=99)
    vocabulary.save(folder / VOCABULARY_FILE)
    return photos, vocabulary


def test_captions_cut_by_hand_keep_their_cuts_through_json_and_score(tmp_path):
    photos, vocabulary = hand_cut_data(tmp_path)
    pairs = [(p, CaptionResult(vocabulary.join(p.captions[0]), list(p.captions[0]), -1.0, True)) for p in photos]
    write_coco(tmp_path / "a.json", pairs)
    annotations = [{"image_id": photo.id, "caption": [" ".join(photo.captions[0])]} for photo in photos]
    for source in (tmp_path, write(tmp_path / "annotations.json", annotations)):
        references = read_reference_photos(source, "val")
        assert [photo.captions for photo in references.photos] == [photo.captions for photo in photos]
        for photo, caption in read_results(tmp_path / "a.json", references):
            assert tuple(caption.words) == photo.captions[0]
    scores = score_captions(read_results(tmp_path / "a.json", references), "zh", "whitespace", java=False)
    assert scores.to_dict()["word"]["BLEU-4"] == pytest.approx(100)


def test_captions_without_spaces_are_split_by_jieba_where_references_are_cut_by_hand(tmp_path, capsys):
    hand_cut_data(tmp_path)
    write(tmp_path / "a.json", [{"image_id": "0.jpg", "caption": "一只小狗在草地上"}])
    ((_, caption),) = read_results(tmp_path / "a.json", read_reference_photos(tmp_path, "val"))
    assert caption.words == ["一只", "小狗", "在", "草地", "上"]
    assert "a.json: captions without spaces, split by jieba; the words of the references" in capsys.readouterr().out


def test_a_user_dictionary_in_the_vocabulary_also_splits_captions_that_are_scored(tmp_path):
    write_captions(tmp_path / CAPTIONS_FILE, [make_photo("1", "遛狗绳 在 地上")])
    words = {"language": "zh", "tokenizer": "jieba", "min_count": 1, "words": [*SPECIAL, "遛狗绳"]}
    write(tmp_path / VOCABULARY_FILE, {**words, "user_dictionary": ["遛狗绳 20"]})
    write(tmp_path / "a.json", [{"image_id": 1, "caption": "遛狗绳在地上"}])
    references = read_reference_photos(tmp_path, "val")
    ((_, caption),) = read_results(tmp_path / "a.json", references)
    assert caption.words == ["遛狗绳", "在", "地上"]
    assert references.tokenizer_text == "jieba with a user dictionary of 1 words"


def test_references_of_before_with_capitals_match_captions_in_lower_case(tmp_path):
    write_captions(tmp_path / CAPTIONS_FILE, [make_photo("1", "穿 T恤 的 人")])
    Vocabulary.build([["人"]], language="zh", tokenizer="jieba", min_count=1, max_words=9).save(
        tmp_path / VOCABULARY_FILE
    )
    write(tmp_path / "a.json", [{"image_id": 1, "caption": "穿T恤的人"}])
    ((photo, caption),) = read_results(tmp_path / "a.json", read_reference_photos(tmp_path, "val"))
    assert tuple(caption.words) == photo.captions[0] == ("穿", "t恤", "的", "人")
