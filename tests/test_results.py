"""Caption files have the formats of COCO and AI Challenger; other files are read, or refused with one line."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.caption import CaptionResult
from captioning.errors import UserError
from captioning.evaluation.results import read_reference_photos, read_results, write_coco, write_csv, write_submission
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary


def make_photo(id, *captions, image=None):
    return Photo(image or f"photos/{id}", id, "val", tuple(tuple(words.split()) for words in captions))


PAIRS = [
    (make_photo("9", "a dog"), CaptionResult("a dog", ["a", "dog"], -1.23456, True)),
    (make_photo("b.jpg", "cats"), CaptionResult("", [], -2.0, False, sentinel=[])),
]


def write(path, data):
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")
    return path


def test_written_results_can_be_read(tmp_path):
    write_coco(tmp_path / "a.json", PAIRS)
    lines = json.loads((tmp_path / "a.json").read_text())
    assert lines[0] == {"image_id": 9, "caption": "a dog", "log_probability": -1.2346, "finished": True}
    found = read_results(tmp_path / "a.json", [photo for photo, _ in PAIRS], "whitespace")
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
    found = read_results(path, [photo for photo, _ in pairs], "whitespace")
    assert [(photo.id, caption.text, caption.finished) for photo, caption in found] == [
        (id, caption.text, caption.finished) for id, caption in captions.items()
    ]


def test_a_submission_has_the_form_of_the_challenges_own_sample(tmp_path, shared):
    sample = json.loads((shared / "ai_challenger/id_to_test_caption.json").read_text("utf-8"))
    pairs = [(make_photo(line["image_id"] + ".jpg"), CaptionResult(" ".join(line["caption"]), [])) for line in sample]
    write_submission(tmp_path / "a.json", pairs)
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == sample
    photos, _, tokenizer = read_reference_photos(shared / "ai_challenger/id_to_words.json", "val", None)
    captions = {found.image: caption.text for found, caption in read_results(tmp_path / "a.json", photos, tokenizer)}
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


def test_a_photo_may_be_named_by_its_id_or_by_an_unambiguous_file_name(tmp_path):
    photos = [make_photo("1", image="a/000001.jpg"), make_photo("x.jpg"), make_photo("x/y.jpg"), make_photo("z/y.jpg")]
    lines = [{"image_id": name, "caption": "a"} for name in ("000001", "x", "x/y.jpg")]
    found = read_results(write(tmp_path / "a.json", lines), photos, "whitespace")
    assert [p.id for p, _ in found] == ["1", "x.jpg", "x/y.jpg"]
    with pytest.raises(UserError, match="image_id y has no references"):
        read_results(write(tmp_path / "b.json", [{"image_id": "y", "caption": "a"}]), photos, "whitespace")
    with pytest.raises(UserError, match="under two names"):
        lines = [{"image_id": 1, "caption": "a"}, {"image_id": "000001", "caption": "b"}]
        read_results(write(tmp_path / "c.json", lines), photos, "whitespace")


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
def test_a_file_without_a_valid_list_of_captions_is_refused_in_one_line(tmp_path, data, reason):
    with pytest.raises(UserError, match=reason) as error:
        read_results(write(tmp_path / "a.json", data), [PAIRS[0][0]], "whitespace")
    assert "\n" not in str(error.value)


def test_references_of_a_data_folder_keep_their_tokens(tmp_path):
    write_captions(tmp_path / CAPTIONS_FILE, [make_photo("1", "a dog", "dogs"), Photo("2", "2", "train", (("a",),))])
    Vocabulary.build([["a"]], language="en", tokenizer="whitespace", min_count=1, max_words=9).save(
        tmp_path / VOCABULARY_FILE
    )
    (found,), language, tokenizer = read_reference_photos(tmp_path, "val", None)
    assert (found.captions, language, tokenizer) == ((("a", "dog"), ("dogs",)), "en", "whitespace")
    with pytest.raises(UserError, match="--tokenizer requires an annotation file"):
        read_reference_photos(tmp_path, "val", "jieba")


def test_references_of_an_annotation_file_are_tokenized_unless_they_are_already(tmp_path):
    def read(captions, tokenizer=None):
        path = write(tmp_path / "a.json", [{"image_id": "a.jpg", "caption": captions}])
        return read_reference_photos(path, "val", tokenizer)

    assert read(["A dog.", "。"])[0][0].captions == (("a", "dog"),)
    assert read(["两只小狗在草地上", "狗"])[0][0].captions[0] == ("两只", "小狗", "在", "草地", "上")
    assert read(["两只小狗 在草地上", "小 狗"])[0][0].captions[0] == ("两只小狗", "在草地上")
    assert read(["两只小狗"], "character")[0][0].captions[0] == tuple("两只小狗")
    assert read(["。"])[0] == []
