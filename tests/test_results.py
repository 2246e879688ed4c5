"""Caption files: what we write is what COCO and AI Challenger read, and anyone's are read or refused in a line."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.caption import CaptionResult
from captioning.errors import UserError
from captioning.evaluation.results import read_captioned, read_photos, write_coco, write_csv, write_submission
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary


def photo(id, *captions, image=None):
    return Photo(image or f"photos/{id}", id, "val", tuple(tuple(words.split()) for words in captions))


PAIRS = [
    (photo("9", "a dog"), CaptionResult("a dog", ["a", "dog"], -1.23456, True)),
    (photo("b.jpg", "cats"), CaptionResult("", [], -2.0, False, sentinel=[])),
]


def written(path, data):
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")
    return path


def test_what_we_write_we_read(tmp_path):
    write_coco(tmp_path / "a.json", PAIRS)
    lines = json.loads((tmp_path / "a.json").read_text())
    assert lines[0] == {"image_id": 9, "caption": "a dog", "log_probability": -1.2346, "finished": True}
    found = read_captioned(tmp_path / "a.json", [photo for photo, _ in PAIRS], "whitespace")
    assert [(p.id, c.words, c.finished) for p, c in found] == [("9", ["a", "dog"], True), ("b.jpg", [], False)]


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
said = st.builds(
    lambda text, sure, ended: CaptionResult(text, text.split(), sure, ended), text, st.floats(-99, 0), st.booleans()
)


@given(captions=st.dictionaries(text.filter(bool) | st.integers(0, 10**20).map(str), said, min_size=1, max_size=5))
def test_whatever_the_ids_and_captions_what_we_write_we_read(tmp_path_factory, captions):
    path = tmp_path_factory.mktemp("results") / "a.json"
    pairs = [(photo(id, image=f"photos/{i}.jpg"), caption) for i, (id, caption) in enumerate(captions.items())]
    write_coco(path, pairs)
    found = read_captioned(path, [photo for photo, _ in pairs], "whitespace")
    assert [(photo.id, caption.text, caption.finished) for photo, caption in found] == [
        (id, caption.text, caption.finished) for id, caption in captions.items()
    ]


def test_a_submission_has_the_form_of_the_challenges_own_sample(tmp_path, shared):
    sample = json.loads((shared / "ai_challenger/id_to_test_caption.json").read_text("utf-8"))
    pairs = [(photo(line["image_id"] + ".jpg"), CaptionResult(" ".join(line["caption"]), [])) for line in sample]
    write_submission(tmp_path / "a.json", pairs)
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == sample
    photos, _, tokenizer = read_photos(shared / "ai_challenger/id_to_words.json", "val", None)
    captions = {found.image: caption.text for found, caption in read_captioned(tmp_path / "a.json", photos, tokenizer)}
    assert captions == {line["image_id"]: line["caption"] for line in sample}


def test_a_submission_has_no_empty_caption_and_no_name_twice(tmp_path):
    write_submission(tmp_path / "a.json", PAIRS)
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))[1] == {"image_id": "b", "caption": "。"}
    with pytest.raises(UserError, match="2 photos are called b there"):
        write_submission(tmp_path / "b.json", [*PAIRS, (photo("folder/b.PNG"), CaptionResult("x", ["x"]))])
    assert not (tmp_path / "b.json").exists()


def test_a_table_opens_in_a_spreadsheet_with_its_commas_quotes_and_chinese(tmp_path):
    pairs = [
        (photo('a,"b".jpg'), CaptionResult("狗, cat", ["狗"], -1.5, True)),
        (photo("c"), CaptionResult("x", ["x"])),
    ]
    write_csv(tmp_path / "a.csv", pairs, np.arange(12).reshape(2, 6))
    assert (tmp_path / "a.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    with open(tmp_path / "a.csv", encoding="utf-8-sig", newline="") as file:
        one, other = csv.DictReader(file)
    assert (one["photo"], one["caption"], one["log_probability"], one["CIDEr-D"]) == (
        'a,"b".jpg',
        "狗, cat",
        "-1.5000",
        "5.00",
    )
    assert other["log_probability"] == other["finished"] == ""
    write_csv(tmp_path / "b.csv", pairs, None)
    assert (tmp_path / "b.csv").read_text("utf-8-sig").splitlines()[0] == "photo,caption,log_probability,finished"


def test_a_photo_may_be_called_by_its_id_or_by_the_name_of_its_file_where_that_is_clear(tmp_path):
    photos = [photo("1", image="a/000001.jpg"), photo("x.jpg"), photo("x/y.jpg"), photo("z/y.jpg")]
    lines = [{"image_id": name, "caption": "a"} for name in ("000001", "x", "x/y.jpg")]
    found = read_captioned(written(tmp_path / "a.json", lines), photos, "whitespace")
    assert [p.id for p, _ in found] == ["1", "x.jpg", "x/y.jpg"]
    with pytest.raises(UserError, match="image_id y has no references"):
        read_captioned(written(tmp_path / "b.json", [{"image_id": "y", "caption": "a"}]), photos, "whitespace")
    with pytest.raises(UserError, match="under two names"):
        lines = [{"image_id": 1, "caption": "a"}, {"image_id": "000001", "caption": "b"}]
        read_captioned(written(tmp_path / "c.json", lines), photos, "whitespace")


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
        ([{"image_id": 7, "caption": "a"}], "image_id 7 has no references"),
    ],
)
def test_a_file_that_is_no_list_of_captions_is_refused_in_a_line(tmp_path, data, reason):
    with pytest.raises(UserError, match=reason) as error:
        read_captioned(written(tmp_path / "a.json", data), [PAIRS[0][0]], "whitespace")
    assert "\n" not in str(error.value)


def test_references_come_from_a_data_folder_as_they_are_cut(tmp_path):
    write_captions(tmp_path / CAPTIONS_FILE, [photo("1", "a dog", "dogs"), Photo("2", "2", "train", (("a",),))])
    Vocabulary.build([["a"]], language="en", tokenizer="whitespace", min_count=1, max_words=9).save(
        tmp_path / VOCABULARY_FILE
    )
    (found,), language, tokenizer = read_photos(tmp_path, "val", None)
    assert (found.captions, language, tokenizer) == ((("a", "dog"), ("dogs",)), "en", "whitespace")
    with pytest.raises(UserError, match="--tokenizer goes with an annotation file"):
        read_photos(tmp_path, "val", "jieba")


def test_references_of_an_annotation_file_are_cut_unless_they_are_cut_already(tmp_path):
    def read(captions, tokenizer=None):
        path = written(tmp_path / "a.json", [{"image_id": "a.jpg", "caption": captions}])
        return read_photos(path, "val", tokenizer)

    assert read(["A dog.", "。"])[0][0].captions == (("a", "dog"),)
    assert read(["两只小狗在草地上", "狗"])[0][0].captions[0] == ("两只", "小狗", "在", "草地", "上")
    assert read(["两只小狗 在草地上", "小 狗"])[0][0].captions[0] == ("两只小狗", "在草地上")
    assert read(["两只小狗"], "character")[0][0].captions[0] == tuple("两只小狗")
    assert read(["。"])[0] == []
