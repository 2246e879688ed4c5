import json
import os
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.errors import UserError
from preprocess.annotations import Record
from preprocess.captions import (
    CAPTIONS_FILE,
    TEXTS_FILE,
    Photo,
    read_captions,
    read_texts,
    stored_path,
    write_captions,
    write_texts,
)

LINE = {"image": "photos/1.jpg", "id": "1", "split": "train", "captions": [["a", "dog"], ["狗"]]}
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
captions = st.lists(st.lists(text, min_size=1, max_size=4).map(tuple), min_size=1, max_size=3).map(tuple)
photos = st.lists(
    st.builds(Photo, text, text, st.sampled_from(["train", "val", "test"]), captions),
    min_size=1,
    max_size=5,
    unique_by=lambda photo: photo.id,
)


def write_lines(folder, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / CAPTIONS_FILE).write_text("".join(line + "\n" for line in texts), "utf-8")
    return folder


def error_message(folder):
    with pytest.raises(UserError) as error:
        list(read_captions(folder))
    assert str(error.value).startswith(str(folder / CAPTIONS_FILE)) and "\n" not in str(error.value)
    return str(error.value)


@given(photos=photos)
def test_photos_survive_writing_and_reading(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("data")
    photos = [replace(photo, image=f"/{photo.image}") for photo in photos]
    write_captions(folder / CAPTIONS_FILE, iter(photos))
    assert list(read_captions(folder)) == photos


def test_a_line_has_the_documented_format(tmp_path):
    write_captions(tmp_path / CAPTIONS_FILE, [Photo("photos/1.jpg", "1", "train", (("a", "dog"), ("狗",)))])
    expected = '{"image": "photos/1.jpg", "id": "1", "split": "train", "captions": [["a", "dog"], ["狗"]]}\n'
    assert (tmp_path / CAPTIONS_FILE).read_bytes() == expected.encode()


def test_equal_words_are_one_object(tmp_path):
    first, second = read_captions(write_lines(tmp_path, LINE, {**LINE, "id": "2"}))
    assert first.captions[0][1] is second.captions[0][1] is sys.intern("dog")


def test_photos_are_read_one_at_a_time(tmp_path):
    assert next(read_captions(write_lines(tmp_path, LINE, "half a li"))).id == "1"


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    def failing():
        yield Photo("2.jpg", "2", "train", (("a",),))
        raise KeyboardInterrupt

    write_lines(tmp_path, LINE)
    before = (tmp_path / CAPTIONS_FILE).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_captions(tmp_path / CAPTIONS_FILE, failing())
    assert (tmp_path / CAPTIONS_FILE).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_an_open_reader_of_the_old_file_is_not_disturbed(tmp_path):
    write_lines(tmp_path, LINE, {**LINE, "id": "2"})
    with open(tmp_path / CAPTIONS_FILE, "rb") as old:
        write_captions(tmp_path / CAPTIONS_FILE, [Photo("3.jpg", "3", "train", (("a",),))])
        assert len(old.readlines()) == 2
    assert [photo.id for photo in read_captions(tmp_path)] == ["3"]


def test_a_path_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_captions(tmp_path / "file" / CAPTIONS_FILE, [])


@pytest.mark.parametrize(
    "line, expected",
    [
        ("{", "JSON"),
        ("", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "keys"),
        ({**LINE, "more": 1}, "keys"),
        ({"image": "a", "id": "2"}, "keys"),
        ({**LINE, "id": 2}, "text"),
        ({**LINE, "image": ""}, "not empty"),
        ({**LINE, "split": "restval"}, "restval"),
        ({**LINE, "split": ["train"]}, "train"),
        ({**LINE, "captions": []}, "at least one caption"),
        ({**LINE, "captions": ["a dog"]}, "list of at least one word"),
        ({**LINE, "captions": [["a"], []]}, "at least one word"),
        ({**LINE, "captions": [["a", ""]]}, "empty"),
        ({**LINE, "captions": [["a", 3]]}, "not text"),
        (LINE, "occurs twice"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, expected):
    text = error_message(write_lines(tmp_path, LINE, line))
    assert f"{CAPTIONS_FILE}:2: " in text and expected in text


def test_a_missing_or_empty_file_names_the_command(tmp_path):
    assert "python -m preprocess" in error_message(tmp_path)
    assert "python -m preprocess" in error_message(write_lines(tmp_path))


def test_bytes_that_are_not_unicode_are_a_bad_line(tmp_path):
    (tmp_path / CAPTIONS_FILE).write_bytes(b'{"image": "\xff"}\n')
    assert f"{CAPTIONS_FILE}:1: " in error_message(tmp_path)


def stored_images(data):
    return [photo.image for photo in read_captions(data)]


def test_a_relative_path_is_told_from_the_folder_of_the_file_wherever_a_command_runs(tmp_path, monkeypatch):
    data, elsewhere = tmp_path / "project/data/x", tmp_path / "elsewhere"
    (data / "photos").mkdir(parents=True)
    (elsewhere / "photos").mkdir(parents=True)
    write_lines(data, {**LINE, "image": "photos/1.jpg"}, {**LINE, "id": "2", "image": "2.jpg"})
    for folder in (tmp_path, elsewhere):
        monkeypatch.chdir(folder)
        assert [os.path.realpath(image) for image in stored_images(data)] == [f"{data}/photos/1.jpg", f"{data}/2.jpg"]


def test_paths_of_older_files_are_found_from_every_folder_and_not_only_where_they_were_made(tmp_path, monkeypatch):
    """They are relative to the folder that preprocess ran in: one above the data, or today's working directory."""
    project = tmp_path / "project"
    data, other = project / "data/x", tmp_path / "other"
    for folder in (data / "photos", project / "images", other / "pictures", tmp_path / "shared"):
        folder.mkdir(parents=True)
    images = ["data/x/photos/1.jpg", "images/2.jpg", "../shared/3.jpg", "pictures/4.jpg", "no such folder/5.jpg"]
    write_lines(data, *({**LINE, "id": image, "image": image} for image in images))
    monkeypatch.chdir(other)
    found = [os.path.normpath(image) for image in stored_images(data)]
    assert found[:2] == [f"{data}/photos/1.jpg", f"{project}/images/2.jpg"]
    assert found[2:] == [f"{tmp_path}/shared/3.jpg", "pictures/4.jpg", f"{data}/no such folder/5.jpg"]


def test_a_written_path_leads_back_to_its_photo(tmp_path, monkeypatch):
    for folder in ("data/x/photos", "images", "disk"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/linked").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    assert stored_path("data/x/photos/1.png", "data/x") == "photos/1.png"
    assert stored_path("images/1.jpg", "data/x") == "../../images/1.jpg"
    assert stored_path("images/1.jpg", "data/linked") == f"{tmp_path}/images/1.jpg"
    assert stored_path("/images/1.jpg", "data/x") == "/images/1.jpg"


def test_texts_are_read_for_some_photos_or_none_are_known(tmp_path):
    assert read_texts(tmp_path, ["1"]) is None
    write_texts(
        tmp_path / TEXTS_FILE, [Record("1.jpg", "1", "val", ("A dog's.", "狗\n")), Record("2", "2", "", ("a",))]
    )
    assert read_texts(tmp_path, ["1"]) == {"1": ("A dog's.", "狗\n")}
    assert read_texts(tmp_path, ["1", "3"]) is None


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "1"}', '{"id": 1, "texts": []}', '{"id": "1", "texts": [2]}'])
def test_a_bad_line_of_texts_is_named_by_its_number(line, tmp_path):
    (tmp_path / TEXTS_FILE).write_text('{"id": "2", "texts": []}\n' + line)
    with pytest.raises(UserError, match="texts.jsonl:2: not an object with the keys id, texts"):
        read_texts(tmp_path, ["1"])
