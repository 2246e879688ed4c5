"""Outputs contain foreign text only as text and lie where the user wants them; oversized inputs are not decoded."""

import html
import os
import struct
import tracemalloc
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageFile

import generate
from captioning.caption import CaptionResult
from captioning.encoders.images import Transform, open_photo, read_photos
from captioning.errors import PhotoError
from captioning.features.feature_writer import FeatureWriter
from captioning.features.hdf5_layout import FORMAT
from captioning.runtime.checkpoint import save_checkpoint
from captioning.runtime.photo_formats import JPEG_PIXELS
from captioning.viewing.attention_plots import CaptionedImage, draw_card
from captioning.viewing.dashboard import comparison_windows, run_windows
from captioning.viewing.html_report import ReportEntry, worst_and_best, write_page
from preprocess.captions import Photo, write_captions

# ---- pages

marks = st.sampled_from(
    [
        "<script>alert(1)</script>",
        "</b><img src=x onerror=alert(1)>",
        '" onload="x',
        "&lt;",
        "'",
        "狗",
        "javascript:x",
        "-->",
        "]]>",
        "<!--",
        "{title}",
        "&#60;",
        "\u202e",
        "</article></body>",
    ]
)
text = st.lists(
    marks | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=5),
    min_size=1,
    max_size=3,
).map("".join)
words = st.lists(text.filter(str.strip), min_size=1, max_size=3)
PAGE_TAGS = set("html meta title style h1 h2 label input article div img b ul li".split())
CARD_TAGS = set("p b ul li img table tr td".split())


class Page(HTMLParser):
    """A parsed page, as a browser sees it: elements with their attributes, and text."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.others = set(), [], "", []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.others.append(data)

    unknown_decl = handle_pi = handle_comment

    def is_harmless(self, tags):
        names = {name for name, _ in self.attributes}
        sources = [value for name, value in self.attributes if name in ("src", "href")]
        return (
            self.tags <= tags
            and not self.others
            and not any(name.startswith("on") for name in names)
            and all(value.startswith("data:image/") for value in sources)
        )


@settings(max_examples=60)
@given(
    title=text,
    heading=text,
    id=text,
    image=text,
    caption=words,
    references=st.lists(words, min_size=1, max_size=2),
    attends=st.booleans(),
)
def test_captions_ids_and_paths_are_plain_text_in_a_page(
    tmp_path_factory, title, heading, id, image, caption, references, attends
):
    path = tmp_path_factory.mktemp("page") / "page.html"
    attention = torch.rand(len(caption), 4) if attends else None
    card = ReportEntry(
        Photo(image, id, "val", tuple(map(tuple, references))),
        CaptionResult(" ".join(caption), caption, -1.0, False, attention, grid=(2, 2)),
        1.5,
    )
    write_page(path, title, "en", [(heading, [card]), *worst_and_best([card, card])])
    page = Page(path.read_bytes().decode())
    assert page.is_harmless(PAGE_TAGS)
    for shown in [title, heading, id, " ".join(caption), *map(" ".join, references)]:
        assert shown in page.text


def make_log(caption, references, setting):
    panel = [{"id": caption, "caption": caption, "references": references, "picture": None}]
    return [
        {"event": "start", "config": {setting: setting}, "versions": {}, "device": setting, "commit": setting},
        {"event": "epoch", "epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "preview": panel},
    ]


@settings(max_examples=60)
@given(caption=text, references=st.lists(text, max_size=2), setting=text, run=text)
def test_the_dashboard_shows_text_as_text(tmp_path_factory, caption, references, setting, run):
    events = make_log(caption, references, setting)
    shown = run_windows(events, tmp_path_factory.mktemp("run"))
    card, table = (Page(shown[name]["data"][0]["content"]) for name in ("photo 1", "settings"))
    assert card.is_harmless(CARD_TAGS) and table.is_harmless(CARD_TAGS)
    assert all(part in card.text for part in [caption, *references]) and table.text.count(setting) >= 3
    for window in comparison_windows({run: events}).values():
        for curve in window["data"]:
            assert "<" not in curve["name"] and html.unescape(curve["name"]).startswith(f"{run}: ")


@pytest.mark.parametrize("picture", ["../secret.png", "{}/secret.png", "pictures/../../secret.png", "..", "", None])
def test_a_log_shows_no_files_but_the_pictures_of_its_run(tmp_path, picture):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "run/pictures").mkdir(parents=True)
    events = make_log("a dog", [], "x")
    events[1]["preview"][0]["picture"] = picture and picture.format(tmp_path)
    assert "data:" not in run_windows(events, tmp_path / "run")["photo 1"]["data"][0]["content"]


# ---- pictures


@given(id=st.text(max_size=12) | st.lists(st.sampled_from(["..", "/", "\\", "C:", ".", "a", "\0", "~"])).map("".join))
def test_a_picture_lies_in_its_folder_whatever_the_id(id):
    drawn = []
    config = SimpleNamespace(pictures=Path("pictures"), animate=False, view="smooth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "open_photo", lambda path: None)
        patch.setattr(generate, "draw_attention", lambda *arguments: drawn.append(arguments[1]))
        generate.draw_picture(config, Photo("a.jpg", id, "val", ()), CaptionResult("", [], attention=torch.ones(0, 4)))
    (path,) = drawn
    assert path.parent == config.pictures and path.suffix == ".png" and path.stem
    assert not set(path.name) & set("/\\\0:") and not path.name.startswith(".")


# ---- files that grow when they are read


def png(side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 10**6)) + chunk(b"IEND", b"")


def gif(side):
    return (
        b"GIF89a"
        + struct.pack("<HH", side, side)
        + b"\x80\0\0"
        + bytes(6)
        + b","
        + struct.pack("<HHHH", 0, 0, side, side)
        + b"\0\x02\x02\x4c\x01\0;"
    )


def tiff(side):
    tags = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: side, 279: 10}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp(side):
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head + bytes(100)


def jpeg(side):
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, side, side, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    return b"\xff\xd8" + frame + b"\xff\xda" + bytes(100) + b"\xff\xd9"


def webp(side):
    canvas = (side - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + canvas + b"VP8L" + struct.pack("<I", 8) + bytes(8)
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {"png": png, "gif": gif, "tif": tiff, "bmp": bmp, "jpg": jpeg, "webp": webp}


@pytest.mark.parametrize("ending", BOMBS)
def test_a_decompression_bomb_is_refused_and_not_decoded(tmp_path, monkeypatch, ending, tally):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    path = tmp_path / f"bomb.{ending}"
    path.write_bytes(BOMBS[ending](60_000))
    tracemalloc.start()
    batch = read_photos([path], [0], Transform())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7 and batch.indices == []
    (failure,) = batch.failures
    limit = Image.MAX_IMAGE_PIXELS * (JPEG_PIXELS if ending == "jpg" else 1)  # JPEGs are decoded at a reduced size
    assert failure == f"{path}: more than {limit:,} pixels" or ending == "webp", failure
    tally("decompression bombs")


def test_compressed_text_in_an_image_cannot_fill_the_memory(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    text = b"zTXtComment\0\0" + zlib.compress(b"a" * 2 * 10**8)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    with pytest.raises(PhotoError, match="a.png: "):
        open_photo(tmp_path / "a.png")


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(trace) (w) file\n%%EOF\n",
        b"\xd7\xcd\xc6\x9a" + bytes(40),
        b"8BPS\0\1" + bytes(40),
    ],
)
def test_programs_and_exotic_formats_are_refused_as_photos(tmp_path, monkeypatch, content):
    """Pillow would pass PostScript to Ghostscript, whatever the name of the file."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("executed"))
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(PhotoError, match="photo.jpg: not an image"):
        open_photo(tmp_path / "photo.jpg")


def test_photos_that_contain_two_images_as_phones_write_them_are_read(tmp_path):
    first, second = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert np.asarray(open_photo(tmp_path / "a.jpg"))[0, 0, 0] > 200


# ---- temporary files


def write_features(path):
    attributes = {
        "grid": "native",
        "native_grid": [1, 1],
        "format": "x",
        "encoder": "e",
        "weights": "w",
        "weights_sha256": "s",
        "precision": "float32",
    }
    FeatureWriter(path, ["a"], attributes | {"format": FORMAT}, 2, "float16", overwrite=False).close()


WRITERS = {
    "captions": lambda path: write_captions(path, [Photo("a.jpg", "a", "train", (("dog",),))]),
    "checkpoint": lambda path: save_checkpoint(path, {"epoch": 1}),
    "picture": lambda path: draw_card(
        CaptionedImage(Image.new("RGB", (9, 9)), "a dog", ["a", "dog"], None, (1, 1)), path
    ),
    "features": write_features,
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_link_in_place_of_a_temporary_file_is_not_followed(tmp_path, what, tally):
    (tmp_path / "victim").write_text("mine")
    path = tmp_path / "out.png"
    for name in ("out.png.tmp", f"out.png.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    WRITERS[what](path)
    assert (tmp_path / "victim").read_text() == "mine"
    assert path.is_file() and not path.is_symlink()
    tally("links in the place of temporary files")
