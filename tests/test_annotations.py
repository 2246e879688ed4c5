import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.errors import UserError
from preprocess import ANNOTATION_READERS
from preprocess.annotations import Entry, Record, read_annotations, read_references

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real annotation files in ../shared")

AI_CHALLENGER = [{"url": "", "image_id": "a.jpg", "caption": ["一只狗", "狗"]}]
COCO = {
    "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 7, "file_name": "7.jpg"}],
    "annotations": [
        {"image_id": 7, "id": 1, "caption": "A cat"},
        {"image_id": 9, "id": 2, "caption": "A dog"},
        {"image_id": 7, "id": 3, "caption": "The cat"},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "1.jpg", "filepath": "val2014", "cocoid": 1, "split": "restval", "sentences": [{"raw": "A dog."}]},
        {"filename": "2.jpg", "split": "test", "sentences": [{"tokens": ["two", "dogs"]}, {"raw": "Dogs"}]},
    ]
}


def read(tmp_path, data, split="train"):
    file = tmp_path / "annotations.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")
    return read_annotations(file, tmp_path, split).records


def error_message(tmp_path, data, split="train"):
    """The message of the error, which must be one line that starts with the file."""
    with pytest.raises(UserError) as error:
        read(tmp_path, data, split)
    text = str(error.value)
    assert text.startswith(str(tmp_path / "annotations.json")) and "\n" not in text and "; " in text
    return text


def test_ai_challenger_is_recognised(tmp_path):
    assert read(tmp_path, AI_CHALLENGER) == [Record(f"{tmp_path}/a.jpg", "a.jpg", "train", ("一只狗", "狗"))]


def test_coco_keeps_the_order_of_images_and_groups_their_captions(tmp_path):
    assert read(tmp_path, COCO, "val") == [
        Record(f"{tmp_path}/9.jpg", "9", "val", ("A dog",)),
        Record(f"{tmp_path}/7.jpg", "7", "val", ("A cat", "The cat")),
    ]


def test_karpathy_names_its_own_splits_and_restval_is_train(tmp_path):
    assert read(tmp_path, KARPATHY, None) == [
        Record(f"{tmp_path}/val2014/1.jpg", "1", "train", ("A dog.",)),
        Record(f"{tmp_path}/2.jpg", "2.jpg", "test", ("two dogs", "Dogs")),
    ]


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\\\0:"), min_size=1, max_size=6)
texts = st.lists(st.text(st.characters(), max_size=6), min_size=1, max_size=4)
some_captions = texts.filter(lambda captions: any(map(str.strip, captions)))
photos = st.dictionaries(names.filter(lambda name: name != ".."), some_captions, min_size=1, max_size=5)


def to_coco(photos):
    images = [{"id": number, "file_name": name} for number, name in enumerate(photos)]
    pairs = [(number, caption) for number, captions in enumerate(photos.values()) for caption in captions]
    return {"images": images, "annotations": [{"image_id": number, "caption": caption} for number, caption in pairs]}


WRITERS = {
    "AI Challenger": lambda photos: [{"image_id": name, "caption": captions} for name, captions in photos.items()],
    "COCO": to_coco,
    "Karpathy": lambda photos: {
        "images": [
            {"filename": name, "split": "train", "sentences": [{"raw": caption} for caption in captions]}
            for name, captions in photos.items()
        ]
    },
}


@given(photos=photos, format=st.sampled_from(sorted(WRITERS)), escaped=st.booleans())
def test_every_format_gives_back_its_photos_and_captions_in_order(tmp_path_factory, photos, format, escaped):
    folder = tmp_path_factory.mktemp("format")
    data = WRITERS[format](photos)
    text = json.dumps(data, ensure_ascii=False)
    if escaped or re.search("[\ud800-\udfff]", text):  # a lone surrogate can only be written escaped
        text = json.dumps(data)
    (folder / "a.json").write_text(text, "utf-8")
    records = read_annotations(folder / "a.json", folder, None if format == "Karpathy" else "train").records
    assert [(record.image, record.captions) for record in records] == [
        (f"{folder}/{name}", tuple(captions)) for name, captions in photos.items()
    ]
    assert [record.id for record in records] == [str(i) if format == "COCO" else name for i, name in enumerate(photos)]


def test_the_name_of_the_file_does_not_matter(tmp_path):
    file = tmp_path / "captions_val2017.karpathy"
    file.write_bytes(json.dumps(AI_CHALLENGER).encode("utf-8-sig"))
    assert read_annotations(file, tmp_path, "test").records[0].split == "test"


@pytest.mark.parametrize("captions", [1, 2, 5, 7])
def test_any_number_of_captions_is_accepted(tmp_path, captions):
    entries = [{"image_id": "a.jpg", "caption": ["狗"] * captions}]
    assert len(read(tmp_path, entries)[0].captions) == captions


def test_an_empty_caption_among_others_is_kept(tmp_path):
    assert read(tmp_path, [{"image_id": "a.jpg", "caption": ["", "狗"]}])[0].captions == ("", "狗")


def test_a_karpathy_file_is_directed_to_its_flag(tmp_path):
    assert "--karpathy" in error_message(tmp_path, KARPATHY)


@pytest.mark.parametrize("data", [AI_CHALLENGER, COCO])
def test_photos_of_other_formats_have_no_split_of_their_own(tmp_path, data):
    assert {record.split for record in read(tmp_path, data, None)} == {""}


def test_an_instances_file_is_refused(tmp_path):
    data = {**COCO, "annotations": [{"image_id": 7, "bbox": [0, 0, 1, 1]}]}
    assert "captions_*.json" in error_message(tmp_path, data)


@pytest.mark.parametrize(
    "data, found",
    [
        ('[{"image_id": ]', "line 1, column 15"),
        ("", "an empty file"),
        ("<html>", "text whose first line is '<html>'"),
        ("[" * 100_000, "not JSON"),
        ("[]", "an empty list"),
        ("3", "a JSON int"),
        ("[[[3]]]", "a JSON list"),
        ('{"categories": [], "images": []}', "['categories', 'images']"),
        ('["a.jpg"]', "a JSON str"),
    ],
)
def test_a_file_of_an_unknown_format_is_described(tmp_path, data, found):
    assert found in error_message(tmp_path, data)


def test_bytes_of_no_known_encoding_are_explained(tmp_path):
    file = tmp_path / "annotations.json"
    file.write_bytes(b'["\xff\xfe"]')
    with pytest.raises(UserError, match="neither UTF-8 nor UTF-16 nor GB18030"):
        read_annotations(file, tmp_path, "train")


@pytest.mark.parametrize(
    "name",
    ["../a.jpg", "/etc/passwd", "b/../../a.jpg", "..", "b\\..\\..\\a.jpg", "C:/a.jpg", "a\0.jpg", "\ud800.jpg", ""],
)
def test_a_path_out_of_the_image_folder_is_refused(tmp_path, name):
    assert "entry 0" in error_message(tmp_path, [{"image_id": name, "caption": ["狗"]}])
    coco = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "dog"}]}
    assert "image 0" in error_message(tmp_path, coco)
    karpathy = {"images": [{"filename": name, "cocoid": 1, "split": "val", "sentences": [{"raw": "dog"}]}]}
    if name:
        assert "image 0" in error_message(tmp_path, karpathy, None)


def test_a_filepath_out_of_the_image_folder_is_refused(tmp_path):
    entry = {**KARPATHY["images"][0], "filepath": "../elsewhere"}
    assert "image 0" in error_message(tmp_path, {"images": [entry]}, None)


def test_an_id_that_cannot_be_encoded_is_refused(tmp_path):
    entry = {**KARPATHY["images"][0], "cocoid": "\ud800"}
    assert "image 0" in error_message(tmp_path, {"images": [entry]}, None)


@pytest.mark.parametrize("name", ["a..b.jpg", "b/a.jpg", "...jpg", "图 1.jpg"])
def test_unusual_names_inside_the_folder_are_accepted(tmp_path, name):
    assert read(tmp_path, [{"image_id": name, "caption": ["狗"]}])[0].image == f"{tmp_path}/{name}"


def left_out(tmp_path, data, split="train"):
    """What is left out, as (the rest of its place, reason, kind), and the number of photos that remain."""
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(data), "utf-8")
    found = read_annotations(file, tmp_path, split)
    return [(item.where.removeprefix(f"{file}: "), item.reason, item.kind) for item in found.left_out], found.records


@pytest.mark.parametrize(
    "entry, reason, kind",
    [
        ({"image_id": "a.jpg", "caption": []}, "no caption", "photo"),
        ({"image_id": "a.jpg", "caption": None}, "no caption", "photo"),
        ({"image_id": "a.jpg"}, "no caption", "photo"),
        ({"image_id": "a.jpg", "caption": ["", " \t"]}, "no caption", "photo"),
        ({"image_id": "a.jpg", "caption": ["狗", 3]}, "a caption that is not text", "caption"),
        ({"image_id": "a.jpg", "caption": ["狗", None]}, "a caption that is null", "caption"),
        ({"image_id": None, "caption": ["狗"]}, "no name of a photo", "photo"),
        ({"image_id": 5, "caption": ["狗"]}, "the photo's name is '5', not text", "photo"),
        ("a.jpg", "no name of a photo", "photo"),
        (None, "no name of a photo", "photo"),
    ],
)
def test_one_bad_entry_is_left_out_and_named_by_its_number(tmp_path, entry, reason, kind):
    (item,), records = left_out(tmp_path, [{"image_id": "first.jpg", "caption": ["狗"]}, entry])
    assert item[0].startswith("entry 1") and item[1:] == (reason, kind)
    assert [record.captions for record in records] == [("狗",)] * (2 if kind == "caption" else 1)


def test_a_file_whose_first_entry_is_bad_is_still_recognised(tmp_path):
    assert len(read(tmp_path, [None, *AI_CHALLENGER])) == 1


@pytest.mark.parametrize(
    "annotation, reason",
    [
        ({"image_id": 8, "caption": "A"}, "belongs to image '8', which 'images' does not list"),
        ({"image_id": 9, "caption": None}, "a caption that is null or not text"),
        ({"image_id": 9}, "a caption that is null or not text"),
        ({"image_id": True, "caption": "A"}, "belongs to image '', which 'images' does not list"),
        (3, "belongs to image '', which 'images' does not list"),
    ],
)
def test_a_bad_coco_annotation_is_left_out(tmp_path, annotation, reason):
    found, records = left_out(tmp_path, {**COCO, "annotations": [*COCO["annotations"], annotation]})
    assert found == [("annotation 3", reason, "caption")] and len(records) == 2


@pytest.mark.parametrize(
    "image, reason",
    [
        ({"id": True, "file_name": "9.jpg"}, "no 'id'"),
        ({"id": None, "file_name": "9.jpg"}, "no 'id'"),
        ({"id": 1}, "no name of a photo"),
        ({"id": 1, "file_name": "1.jpg"}, "no caption"),
    ],
)
def test_a_bad_coco_image_is_left_out(tmp_path, image, reason):
    ((where, found, kind),), records = left_out(tmp_path, {**COCO, "images": [*COCO["images"], image]})
    assert where.startswith("image 2") and (found, kind) == (reason, "photo") and len(records) == 2


def test_ids_of_coco_may_be_text_and_match_integers(tmp_path):
    data = {"images": [{"id": "x1", "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}]}
    data["annotations"] = [{"image_id": "x1", "caption": "A"}, {"image_id": "7", "caption": "B"}]
    assert [(record.id, record.captions) for record in read(tmp_path, data)] == [("x1", ("A",)), ("7", ("B",))]


def test_a_coco_file_that_lists_an_image_twice_or_none_is_refused(tmp_path):
    assert "'9' occurs twice" in error_message(tmp_path, {**COCO, "images": COCO["images"] * 2})
    assert "holds no images" in error_message(tmp_path, {"images": [], "annotations": []})
    assert "holds no photo with a caption: image 0" in error_message(tmp_path, {**COCO, "annotations": []})


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"split": "other"}, "split 'other' is none of train, val, test, restval, validation, valid, dev"),
        ({"split": None}, "no 'split'"),
        ({"sentences": [{}]}, "no caption"),
        ({"sentences": None}, "no caption"),
        ({"filename": None}, "no name of a photo"),
    ],
)
def test_a_bad_karpathy_entry_is_left_out(tmp_path, change, reason):
    entry = {**KARPATHY["images"][1], "filename": "3.jpg", **change}
    ((where, found, kind),), records = left_out(tmp_path, {"images": [KARPATHY["images"][0], entry]}, None)
    assert where.startswith("image 1") and (found, kind) == (reason, "photo") and len(records) == 1


@pytest.mark.parametrize("name", ["validation", "dev", "valid", "val", "Validation"])
def test_all_names_of_the_validation_split_are_val(tmp_path, name):
    assert read(tmp_path, {"images": [{**KARPATHY["images"][0], "split": name}]}, None)[0].split == "val"


def test_null_is_absent_in_karpathy_files(tmp_path):
    entry = {**KARPATHY["images"][0], "cocoid": None, "filepath": None}
    assert read(tmp_path, {"images": [entry]}, None) == [Record(f"{tmp_path}/1.jpg", "1.jpg", "train", ("A dog.",))]


def test_an_image_that_occurs_twice_is_refused(tmp_path):
    assert "'a.jpg' occurs twice" in error_message(tmp_path, AI_CHALLENGER * 2)


def test_a_missing_file_and_a_folder_have_different_messages(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_annotations(tmp_path / "none.json", tmp_path, "train")
    with pytest.raises(UserError, match="found an empty folder"):
        read_annotations(tmp_path, tmp_path, "train")
    with pytest.raises(UserError, match="no such image folder"):
        read_annotations(tmp_path / "none.json", tmp_path / "photos", "train")


@needs_shared
def test_the_real_files_are_read():
    coco, flickr = SHARED / "coco_mini", SHARED / "flickr8k"
    full = read_annotations(coco / "annotations" / "captions_val2017_full.json", coco / "val2017", "val").records
    assert len(full) == 5_000 and sum(len(record.captions) for record in full) == 25_014
    chinese = read_annotations(flickr / "caption_train_annotations_zh.json", flickr / "images", "train").records
    assert len(chinese) == 6_000 and all(len(record.captions) == 5 for record in chinese)
    english = read_annotations(flickr / "dataset_flickr8k.json", flickr / "images", None).records
    assert [sum(record.split == split for record in english) for split in ("train", "val")] == [6_000, 1_000]
    challenge = read_annotations(SHARED / "ai_challenger" / "caption_train_first2.json", flickr, "train").records
    assert challenge[1].id == "b96ff46ba5b1cbe5bb4cc32b566431132ca71a64.jpg"
    with pytest.raises(UserError, match="occurs twice"):  # the sample references list an image once per caption
        read_annotations(SHARED / "ai_challenger" / "id_to_words.json", flickr, "train")


def test_references_are_read_in_any_format_without_the_photos(tmp_path):
    """The references of AI Challenger list an image once per caption; a Karpathy file gives one split."""
    coco = {"images": [{"id": 9, "file_name": "n"}] * 2, "annotations": [{"image_id": 9, "caption": c} for c in "ab"]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (record,) = read_references(tmp_path / "coco.json", "val")
    assert (record.id, record.image, record.captions) == ("9", "n", ("a", "b"))
    images = [{"filename": f"{split}.jpg", "split": split, "sentences": [{"raw": "a"}]} for split in ("train", "val")]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": images}))
    assert [record.id for record in read_references(tmp_path / "karpathy.json", "val")] == ["val.jpg"]
    with pytest.raises(UserError, match="holds no test images; give another --split"):
        read_references(tmp_path / "karpathy.json", "test")


class PairsReader:
    """A reader as a user might add it: {"rows": [["a.jpg", "a dog"]]}."""

    description = "pairs"

    def recognises(self, content):
        return isinstance(content.data, dict) and "rows" in content.data

    def read(self, content):
        for name, caption in content.data["rows"]:
            yield Entry(str(content.path), name, caption)


def test_a_registered_reader_reads_its_format_and_is_named_in_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(ANNOTATION_READERS, "_entries", dict(ANNOTATION_READERS._entries))
    ANNOTATION_READERS.register("pairs", PairsReader)
    assert read(tmp_path, {"rows": [["a.jpg", "a dog"]]}) == [Record(f"{tmp_path}/a.jpg", "a.jpg", "train", ("a dog",))]
    assert "a folder of 1.jpg beside 1.txt or 1.json and pairs; " in error_message(tmp_path, [])
