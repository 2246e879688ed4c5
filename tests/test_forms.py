"""The forms of docs/data.md: its examples and commands, and what each reader gives."""

import io
import os
import re
import shlex
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioning.errors import UserError
from captioning.runtime import command_line
from config import Preprocess
from preprocess.__main__ import main
from preprocess.annotations import read_annotations
from preprocess.captions import read_captions
from preprocess.columns import Columns
from preprocess.folders import split_in_name
from preprocess.left_out import LEFT_OUT_FILE
from preprocess.readers import photo_folder

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text("utf-8")
SECTIONS = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
SAID = r"^`(?P<file>[^`]+)`(?P<said>[^\n]*(?:\n[^\n]+)*):\n\n"
EXAMPLE = re.compile(SAID + r"```text\n(?P<text>.*?)```", re.DOTALL | re.MULTILINE)


def examples():
    """(section, text of the section) of each section that has a command."""
    return [pytest.param(body, id=title) for title, body in SECTIONS if "```sh" in body]


def lay_out(folder, body):
    """Write the examples of a section, and empty photos where its text says that they lie. Returns the photos."""
    photos = set()
    for example in EXAMPLE.finditer(body):
        file = folder / example["file"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(example["text"], "utf-8")
        if match := re.search(r"photos? in `([^`]+)`", example["said"]):
            names = re.findall(r"[\w./-]+\.jpg", example["text"] + example["said"])
            names += [f"{name}.jpg" for name in re.findall(r"COCO_\w+", example["text"])]
            for name in names:
                photo = folder / match[1] / name.removeprefix(f"{Path(match[1]).name}/")
                photo.parent.mkdir(parents=True, exist_ok=True)
                photo.touch()
                photos.add(photo)
    return photos


@pytest.mark.parametrize("body", examples())
def test_every_example_of_the_page_becomes_data_with_its_command(tmp_path, monkeypatch, body):
    monkeypatch.chdir(tmp_path)
    unused = lay_out(tmp_path, body)
    for line in re.findall(r"^python -m preprocess (.*)$", body, re.MULTILINE):
        arguments = [*shlex.split(line), "--min-count", "1", "--workers", "1"]
        config = command_line.parse(Preprocess, arguments)
        main(config)
        photos = list(read_captions(config.data))
        assert {photo.split for photo in photos} >= {"train", "val"}
        unused -= {Path(os.path.realpath(photo.image)) for photo in photos}
    assert not unused, "every photo of the examples has a caption and a split"


def read(tmp_path, text, name="captions.txt", split=None, columns=None, encoding="utf-8"):
    file = tmp_path / name
    file.write_bytes(text.encode(encoding))
    found = read_annotations(file, tmp_path, split, columns)
    return [(record.id, record.split, record.captions) for record in found.records], found.left_out


def captions(*args, **kwargs):
    return {id: texts for id, _, texts in read(*args, **kwargs)[0]}


def test_quoted_commas_quotes_and_line_breaks_belong_to_the_caption(tmp_path):
    text = 'image,caption\r\na.jpg,"A dog, a cat"\r\n'
    text += 'a.jpg,"so-called ""art"""\r\nb.jpg,"two\nlines"\r\nb.jpg,a 5" wheel\r\n'
    assert captions(tmp_path, text) == {
        "a.jpg": ("A dog, a cat", 'so-called "art"'),
        "b.jpg": ("two\nlines", 'a 5" wheel'),
    }


def test_a_comma_that_nobody_quoted_stays_in_the_last_column(tmp_path):
    assert captions(tmp_path, "image,caption\na.jpg,a dog, a cat\n") == {"a.jpg": ("a dog, a cat",)}


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path):
    rows = "".join(f"{number}.jpg,a dog\n" for number in range(60))
    assert len(captions(tmp_path, f'image,caption\nx.jpg,"a cat\n{rows}')) == 61


def test_a_carriage_return_within_a_quoted_row_is_no_traceback(tmp_path):
    text = '"x\ry",image,caption\nz,a.jpg,a dog\n"u\rv"w,b.jpg,"a\rcat\n'
    assert captions(tmp_path, text)["a.jpg"] == ("a dog",)


def test_columns_may_be_in_any_order_have_other_names_and_hold_the_split(tmp_path):
    text = "split\tn\ttitle\tfilepath\nvalidation\t3\ta dog\ta.jpg\n\t4\ta cat\tb.jpg\n"
    assert read(tmp_path, text)[0] == [("a.jpg", "val", ("a dog",)), ("b.jpg", "", ("a cat",))]
    own = Columns("n", "filepath")
    assert captions(tmp_path, text, columns=own) == {"3": ("a.jpg",), "4": ("b.jpg",)}


def test_a_table_without_header_is_a_photo_and_its_caption(tmp_path):
    assert captions(tmp_path, "a.jpg\ta dog, a cat\nb.PNG\ta bird\n") == {
        "a.jpg": ("a dog, a cat",),
        "b.PNG": ("a bird",),
    }


cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
cells = cells.filter(lambda cell: cell.strip() and cell.strip()[0] != "[")  # which may be a list of captions
tables = st.dictionaries(st.from_regex(r"[a-z]{1,5}\.jpg", fullmatch=True), cells, min_size=1, max_size=5)


@given(table=tables, delimiter=st.sampled_from(",\t"), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_a_table_gives_back_its_captions_in_every_encoding(tmp_path_factory, table, delimiter, encoding):
    quoted = {name: '"' + text.replace('"', '""') + '"' for name, text in table.items()}
    text = "".join(f"{name}{delimiter}{caption}\n" for name, caption in {"image": "caption", **quoted}.items())
    found = captions(tmp_path_factory.mktemp("table"), text, encoding=encoding)
    assert found == {name: (caption.strip(),) for name, caption in table.items()}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "gb18030"])
def test_another_encoding_is_read_and_said(tmp_path, capsys, encoding):
    assert captions(tmp_path, "image,caption\na.jpg,一只狗在跑\n", encoding=encoding) == {"a.jpg": ("一只狗在跑",)}
    assert f"read as {encoding.upper()}" in capsys.readouterr().out


def test_a_european_encoding_is_not_taken_for_chinese(tmp_path):
    with pytest.raises(UserError, match="neither UTF-8 nor UTF-16 nor GB18030 text; give a text file, or save it as"):
        read(tmp_path, "image,caption\na.jpg,café crème brûlée\n", encoding="latin-1")


def test_numbered_captions_of_english_and_chinese_files(tmp_path):
    text = "a.jpg#0\tA dog #1 .\na.jpg#1\tDogs\nb#zhc#0 一只 狗\n\nnonsense\n"
    found, (bad,) = read(tmp_path, text)
    assert found == [("a.jpg", "", ("A dog #1 .", "Dogs")), ("b", "", ("一只 狗",))]
    assert bad.where.endswith("line 5") and bad.kind == "caption"


def test_the_broken_row_of_flickr30k_is_left_out(tmp_path):
    text = "image_name| comment_number| comment\na.jpg| 0| A dog | runs .\na.jpg| 4   A dog runs .\n"
    found, (bad,) = read(tmp_path, text)
    assert found == [("a.jpg", "", ("A dog | runs .",))] and bad.reason == "a row without the caption column"


def test_lines_of_json_and_a_line_that_is_not(tmp_path):
    text = '{"file_name": "a.jpg", "text": "a dog"}\n{"file_name": "a.jpg", "text": ["Dogs", null]}\n{"file_\n'
    found, bad = read(tmp_path, text, "metadata.jsonl")
    assert found == [("a.jpg", "", ("a dog", "Dogs"))]
    assert [item.reason for item in bad] == ["a caption that is null", "no name of a photo"]


def test_a_row_of_blip_is_named_by_its_photo_and_not_by_its_image_id(tmp_path):
    text = '[{"caption": "a dog", "image": "val2014/1.jpg", "image_id": "coco_1"}]'
    assert captions(tmp_path, text) == {"val2014/1.jpg": ("a dog",)}


def test_one_text_of_ai_challenger_is_a_caption_and_several_add_up(tmp_path):
    text = '[{"image_id": "a.jpg", "caption": "狗"}, {"image_id": "a.jpg", "caption": "一只狗"}]'
    assert captions(tmp_path, text) == {"a.jpg": ("狗", "一只狗")}


@pytest.mark.parametrize("text", ['[{"image_id": "a.jpg"}]', '{"images": [{"id": 1, "file_name": "a.jpg"}]}'])
def test_a_list_of_photos_to_caption_is_directed_to_generate(tmp_path, text):
    with pytest.raises(UserError, match="lists photos without captions; caption them with generate.py"):
        read(tmp_path, text)


def test_rejected_and_canned_captions_of_vizwiz_are_left_out_as_marked(tmp_path):
    text = """{"images": [{"id": 0, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}], "annotations": [
        {"image_id": 0, "caption": "a can", "is_rejected": false, "is_precanned": false},
        {"image_id": 0, "caption": "spam", "is_rejected": true, "is_precanned": false},
        {"image_id": 1, "caption": "Quality issues.", "is_rejected": false, "is_precanned": true}]}"""
    found, bad = read(tmp_path, text)
    assert found == [("0", "", ("a can",))] and [item.kind for item in bad] == ["marked"] * 3


def test_a_table_that_names_its_splits_is_not_given_to_train(tmp_path):
    with pytest.raises(UserError, match="names the split of each photo, such as val of 'a.jpg'; give it to --source"):
        read(tmp_path, "image,caption,split\na.jpg,a dog,val\n", split="train")


@pytest.mark.parametrize(
    "name, split",
    [
        ("Flickr_8k.trainImages", "train"),
        ("flickr8ktest", "test"),
        ("captions_val2017", "val"),
        ("coco-cn_dev", "val"),
        ("train-00000-of-00003", "train"),
        ("validation", "val"),
        ("contest", None),
        ("training", None),
        ("captions", None),
    ],
)
def test_a_split_is_seen_in_a_name(name, split):
    assert split_in_name(name) == split


# ---- --source


def preprocess(folder, source, **settings):
    main(Preprocess(folder / "data", source=source, **{"workers": 1, "min_count": 1, **settings}))
    return {photo.id: photo for photo in read_captions(folder / "data")}


def put(root, **files):
    """Write files: "__" in a name is /, "_" before the last part of a name a dot; photos are empty."""
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")


def test_photos_of_one_name_in_two_folders_get_their_paths_as_ids(tmp_path):
    line = '{"file_name": "0001.jpg", "text": "a dog"}\n'
    put(tmp_path / "hf", train__metadata_jsonl=line, train__0001_jpg="", test__metadata_jsonl=line, test__0001_jpg="")
    put(tmp_path / "hf", validation__metadata_jsonl=line, validation__0001_jpg="")
    photos = preprocess(tmp_path, tmp_path / "hf")
    assert {id: photo.split for id, photo in photos.items()} == {
        "test/0001.jpg": "test",
        "train/0001.jpg": "train",
        "validation/0001.jpg": "val",
    }


def test_hidden_files_and_folders_are_passed_over_and_counted(tmp_path, capsys):
    put(tmp_path / "set", captions_txt="image,caption\n1.jpg,a dog\n2.jpg,a cat\n")
    put(tmp_path / "set", **{"Images__1_jpg": "", "Images__2_jpg": "", "__MACOSX__captions_txt": ""})
    for hidden in ("__MACOSX/captions.txt", ".cache/captions.txt", "Images/._1.jpg"):
        (tmp_path / "set" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / hidden).write_text("image,caption\n1.jpg,a fox\n")
    photos = preprocess(tmp_path, tmp_path / "set")
    assert sorted(photos) == ["1.jpg", "2.jpg"]
    assert "3 hidden files and folders passed over" in capsys.readouterr().out


def test_links_of_a_cache_are_followed_and_equal_photos_share_a_split(tmp_path):
    put(tmp_path / "blobs", abc="", **{"ann": "image,caption\n" + "".join(f"{i}.jpg,a dog {i}\n" for i in range(40))})
    snapshot = tmp_path / "snapshots/1"
    snapshot.mkdir(parents=True)
    (snapshot / "metadata.csv").symlink_to(tmp_path / "blobs/ann")
    for number in range(40):
        target = "abc" if number < 20 else f"other{number}"
        (tmp_path / "blobs" / target).touch()
        (snapshot / f"{number}.jpg").symlink_to(f"../../blobs/{target}")
    photos = preprocess(tmp_path, snapshot, val_share=0.5)
    assert len({photos[f"{number}.jpg"].split for number in range(20)}) == 1
    assert len({photo.split for photo in photos.values()}) == 2


def test_links_to_folders_are_followed_and_no_folder_is_entered_twice(tmp_path):
    put(tmp_path / "disk", **{"1_jpg": "", "1_txt": "a dog", "2_jpg": "", "2_txt": "a cat"})
    (tmp_path / "set").mkdir()
    (tmp_path / "set/photos").symlink_to("../disk")
    (tmp_path / "disk/back").symlink_to("../set")
    assert sorted(preprocess(tmp_path, tmp_path / "set")) == ["photos/1.jpg", "photos/2.jpg"]


def test_a_photo_in_a_folder_below_is_found_by_its_name_if_only_one_has_it(tmp_path):
    put(tmp_path / "set", captions_csv="image,caption\n1.jpg,a dog\n2.jpg,a cat\n3,a fox\n")
    put(tmp_path / "set/photos", a__1_jpg="", b__1_jpg="", a__2_jpg="", b__3_jpg="")
    main(
        Preprocess(
            tmp_path / "data",
            train=(tmp_path / "set/captions.csv", tmp_path / "set/photos"),
            allow_missing=0.5,
            workers=1,
            min_count=1,
        )
    )
    photos = {photo.id: os.path.relpath(photo.image, tmp_path) for photo in read_captions(tmp_path / "data")}
    assert photos == {"2.jpg": "set/photos/a/2.jpg", "3": "set/photos/b/3.jpg"}


def test_one_photo_in_two_splits_is_refused_by_its_file(tmp_path):
    put(tmp_path / "set", captions_csv="image,caption,split\na.jpg,a dog,train\nb.jpg,a dog,test\n", a_jpg="")
    (tmp_path / "set/b.jpg").symlink_to("a.jpg")
    with pytest.raises(UserError, match=r"b.jpg: the same photo is in train \(as 'a.jpg'\) and in test \(as 'b.jpg'\)"):
        preprocess(tmp_path, tmp_path / "set")


def test_what_is_left_out_is_listed_and_limited(tmp_path, capsys):
    rows = "".join(f"{number}.jpg,a dog\n" for number in range(30))
    put(tmp_path / "set", captions_csv=f"image,caption\n{rows}x.jpg\n", **{f"{i}_jpg": "" for i in range(29)})
    with pytest.raises(UserError, match=r"29.jpg: no such photo; 1 of 30 photos .* --allow-missing 0.04"):
        preprocess(tmp_path, tmp_path / "set")
    assert len(preprocess(tmp_path, tmp_path / "set", allow_missing=0.05)) == 29
    assert "1 x no such photo" in capsys.readouterr().out
    listed = (tmp_path / "data" / LEFT_OUT_FILE).read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["a row without the caption column", "no such photo"]


def test_val_and_test_shares_split_by_the_hash(tmp_path):
    rows = "".join(f"{number}.jpg,a dog\n" for number in range(200))
    put(tmp_path / "set", captions_csv=f"image,caption\n{rows}", **{f"{i}_jpg": "" for i in range(200)})
    photos = preprocess(tmp_path, tmp_path / "set", val_share=0.2, test_share=0.3)
    counts = [sum(photo.split == split for photo in photos.values()) for split in ("train", "val", "test")]
    assert 80 < counts[0] < 120 and 25 < counts[1] < 55 and 45 < counts[2] < 75


def test_tars_are_unpacked_once_without_links_and_paths_that_lead_out(tmp_path):
    members = {
        "1.jpg": b"",
        "1.txt": b"a dog\nDogs\n",
        "../evil.jpg": b"",
        "/root.jpg": b"",
        "._1.jpg": b"",
        "a.py": b"",
    }
    (tmp_path / "tars").mkdir()
    for name in ("train-0.tar", "val-0.tar"):
        with tarfile.open(tmp_path / "tars" / name, "w") as tar:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    photos = preprocess(tmp_path, tmp_path / "tars", allow_missing=0.5)
    assert {id: photo.split for id, photo in photos.items()} == {"train-0/1.jpg": "train", "val-0/1.jpg": "val"}
    assert photos["val-0/1.jpg"].captions == (("a", "dog"), ("dogs",))
    unpacked = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert not any("evil" in name or "link" in name or "._" in name for name in unpacked)
    photo = tmp_path / "data/photos/train-0/1.jpg"
    written = photo.stat().st_mtime_ns
    preprocess(tmp_path, tmp_path / "tars", allow_missing=0.5)
    assert photo.stat().st_mtime_ns == written


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def test_shards_of_img2dataset_are_read_from_their_folders_with_captions_in_json(tmp_path, capsys):
    """As for CC3M: .json, and mostly .txt, in the tars; statistics and a table of the links beside them."""
    for split in ("train", "val"):
        members = {
            "0.jpg": "",
            "0.json": '{"caption": "no", "url": "u"}',
            "0.txt": "a dog",
            "1.jpg": "",
            "1.json": '{"caption": "a cat", "key": "1", "status": "success"}',
            "2.jpg": "",
            "2.json": '{"captions": ["a fox", "Foxes", null]}',
            "3.jpg": "",
            "3.json": '{"caption": null}',
            "4.json": '{"caption": "no photo", "status": "failed_to_download"}',
        }
        write_tar(tmp_path / "cc3m" / split / "00000.tar", members)
        (tmp_path / "cc3m" / split / "00000_stats.json").write_text('{"count": 4, "successes": 3}', "utf-8")
    photos = preprocess(tmp_path, tmp_path / "cc3m", allow_missing=0.5)
    assert {id: photo.captions for id, photo in photos.items() if photo.split == "val"} == {
        "val/00000/0.jpg": (("a", "dog"),),
        "val/00000/1.jpg": (("a", "cat"),),
        "val/00000/2.jpg": (("a", "fox"), ("foxes",)),
    }
    assert len(photos) == 6
    unpacked = tmp_path / "data/photos/train/00000"
    assert sorted(file.name for file in unpacked.iterdir() if file.suffix != ".jpg") == [
        "0.txt", "1.json", "2.json", "3.json", "4.json"
    ]  # fmt: skip


def test_a_text_beside_a_photo_precedes_json_unless_it_is_empty_and_a_damaged_one_is_left_out(tmp_path):
    put(tmp_path / "set", train__1_jpg="", train__1_txt="a dog", train__1_json='{"caption": "no"}', val__2_jpg="")
    put(tmp_path / "set", val__2_txt="", val__2_json='["a cat", "cats"]', val__3_jpg="", val__3_json="{", val__4_jpg="")
    (tmp_path / "set/val/4.txt").write_bytes(b"\xff\xfe\xff")
    photos = preprocess(tmp_path, tmp_path / "set", allow_missing=0.5)
    assert {id: photo.captions for id, photo in photos.items()} == {
        "train/1.jpg": (("a", "dog"),),
        "val/2.jpg": (("a", "cat"), ("cats",)),
    }


def test_only_files_without_the_ending_of_a_photo_are_opened_to_see_whether_they_are_photos_and_once(
    tmp_path, monkeypatch, capsys
):
    opened = []
    monkeypatch.setattr(photo_folder, "is_photo", lambda file: opened.append(file.name) or file.name == "2")
    put(tmp_path / "set", **{"1_jpg": "", "1_txt": "a dog", "2_txt": "a cat", "3_txt": "a fox", "1_json": "{}"})
    put(tmp_path / "set", **{"2": "", "LICENSE": "", "1_npy": "", "2_npy": ""})
    assert sorted(preprocess(tmp_path, tmp_path / "set")) == ["1.jpg", "2"]
    assert sorted(opened) == ["1.npy", "2", "2.npy", "LICENSE"]
    assert "3 x no photo" in capsys.readouterr().out


def test_paths_that_windows_wrote_are_found(tmp_path):
    put(tmp_path / "set", captions_csv="image,caption\nImages\\1.JPG,a dog\n.\\Images\\b.jpg,a cat\n")
    put(tmp_path / "set", Images__1_jpg="", Images__B_jpg="")
    photos = preprocess(tmp_path, tmp_path / "set")
    assert [Path(photo.image).name for photo in photos.values()] == ["1.jpg", "B.jpg"]
    assert list(photos) == ["Images/1.JPG", "Images/b.jpg"]
    put(tmp_path / "set", Images__b_jpg="", Images__1_JpG="")
    with pytest.raises(UserError, match="1.JPG: no such photo"):  # two fit it
        preprocess(tmp_path, tmp_path / "set", overwrite=True)


@pytest.mark.parametrize("path", ["..\\a.jpg", "C:\\a.jpg", "\\\\server\\a.jpg", "x\\..\\..\\a.jpg"])
def test_a_path_of_windows_may_not_lead_out_either(tmp_path, path):
    with pytest.raises(UserError, match="not a path in the image folder"):
        read(tmp_path, f"image,caption\n{path},a dog\n")


def test_several_files_without_splits_ask_for_one(tmp_path):
    put(tmp_path / "set", a_csv="image,caption\n1.jpg,a dog\n", b_csv="image,caption\n1.jpg,a dog\n", **{"1_jpg": ""})
    with pytest.raises(UserError, match=r"2 files hold captions \(a.csv, b.csv\); give one of them to --source"):
        preprocess(tmp_path, tmp_path / "set")


def test_parquet_holds_its_photos_or_names_them(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [parquet]")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "set").mkdir()
    for split, number in (("train", 3), ("validation", 1)):
        images = [{"bytes": b"\x89PNG" + bytes([i]), "path": "x.png"} for i in range(number)]
        texts = [f"a dog {i}" for i in range(number - 1)] + [None if number > 1 else "a cat"]
        table = pyarrow.table({"image": images, "text": texts, "other": ["-"] * number})
        parquet.write_table(table, tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    photos = preprocess(tmp_path, tmp_path / "set", allow_missing=0.5)
    assert sorted(photo.split for photo in photos.values()) == ["train", "train", "val"]
    first = photos["train-00000-of-00001/00000000.png"]
    assert Path(first.image).read_bytes() == b"\x89PNG\0" and first.captions == (("a", "dog", "0"),)
    names = pyarrow.table({"file_name": ["1.jpg", "2.jpg"], "caption": ["a dog", "a cat"]})
    put(tmp_path / "beside", **{"1_jpg": "", "2_jpg": ""})
    parquet.write_table(names, tmp_path / "beside/all.parquet")
    (tmp_path / "two").mkdir()
    assert sorted(preprocess(tmp_path / "two", tmp_path / "beside")) == ["1.jpg", "2.jpg"]


def test_parquet_without_its_extra_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(UserError, match=r"Parquet needs pyarrow; install it with: pip install 'kantu\[parquet\]'"):
        preprocess(tmp_path, tmp_path / "a.parquet")
