"""The page is one file: nothing is fetched, nothing runs, everything is escaped, and maps lie where attention was."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.caption import CaptionResult
from captioning.viewing.html_report import extremes, write_page
from preprocess.captions import Photo


class Reader(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data.strip())


@pytest.fixture
def read(tmp_path):
    def read(*cards, language="en"):
        write_page(tmp_path / "page.html", "a & b", language, [("<heading>", cards)])
        return Reader((tmp_path / "page.html").read_text("utf-8"))

    Image.new("RGB", (600, 300), "red").save(tmp_path / "photo.png")
    return read


def card(tmp_path, words=("a", "<b>dog"), cider=None, **more):
    photo = Photo(str(tmp_path / "photo.png"), "<id>", "val", (("one", "dog"), ("<script>",)))
    return photo, CaptionResult(" ".join(words), list(words), **more), cider


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_page_fetches_nothing_runs_nothing_and_escapes_everything(tmp_path, read):
    page = read(card(tmp_path, log_probability=-3.5, finished=False, cider=12.34))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "dog", "id"}
    assert all(
        value.startswith("data:")
        for _, some in page.elements
        for name, value in some.items()
        if name in ("src", "href")
    )
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "Point at a word" not in text, "there is no attention to see"
    assert "url(" not in text and "http" not in text
    assert {"a & b", "<heading>", "one dog", "<script>"} <= set(page.text)
    assert "<id> · log-probability -3.50 · unfinished · CIDEr-D 12.3" in page.text


def test_the_map_of_a_word_lets_light_through_where_attention_was(tmp_path, read):
    attention = torch.zeros(2, 6)
    attention[0, 4], attention[1, 0], attention[1, 1] = 0.9, 0.5, 0.25
    page = read(card(tmp_path, attention=attention, grid=(2, 3), sentinel=[0.1, 0.25]))
    assert any(text.startswith("Point at a word") for text in page.text)
    photo, *maps = (picture(some["src"]) for tag, some in page.elements if tag == "img")
    assert photo.size == (256, 128)
    dark = [np.asarray(shade)[..., 1] for shade in maps]
    assert dark[0].tolist() == [[217, 217, 217], [217, 0, 217]]
    assert dark[1][0].tolist() == [0, 108, 217]
    assert [some.get("title", "")[:6] for tag, some in page.elements if tag == "b"] == ["β 0.10", "β 0.25"]


def test_chinese_words_stand_side_by_side(tmp_path, read):
    assert "狗奔跑" in read(card(tmp_path, words=["狗", "奔跑"]), language="zh").text


def test_a_photo_that_cannot_be_read_leaves_its_reason(tmp_path, read):
    (tmp_path / "photo.png").unlink()
    page = read(card(tmp_path, attention=torch.ones(2, 4), grid=(2, 2)))
    assert any(text.endswith("photo.png: no such file") for text in page.text)


def test_the_extremes_are_the_lowest_and_the_highest_scores_and_no_card_is_in_both(tmp_path):
    cards = [card(tmp_path, cider=float(score)) for score in (3, 1, 4, 5, 9, 2, 6)]
    (worst, low), (best, high) = extremes(cards)
    assert (worst, best) == ("The 3 worst", "The 3 best")
    assert [c[2] for c in low] == [1, 2, 3] and [c[2] for c in high] == [9, 6, 5]
    assert [len(cards) for _, cards in extremes(cards * 20)] == [50, 50]
