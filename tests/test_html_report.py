"""The HTML report is one file: it downloads nothing, runs nothing, escapes all text, and shows attention correctly."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from captioning.caption import CaptionResult
from captioning.viewing.html_report import ReportEntry, worst_and_best, write_page
from preprocess.captions import Photo


class ParsedPage(HTMLParser):
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
def write_and_parse(tmp_path):
    def write_and_parse(*entries, language="en"):
        write_page(tmp_path / "page.html", "a & b", language, [("<heading>", entries)])
        return ParsedPage((tmp_path / "page.html").read_text("utf-8"))

    Image.new("RGB", (600, 300), "red").save(tmp_path / "photo.png")
    return write_and_parse


def make_entry(tmp_path, words=("a", "<b>dog"), cider=None, **fields):
    photo = Photo(str(tmp_path / "photo.png"), "<id>", "val", (("one", "dog"), ("<script>",)))
    return ReportEntry(photo, CaptionResult(" ".join(words), list(words), **fields), cider)


def decode_image(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_page_downloads_nothing_runs_nothing_and_escapes_everything(tmp_path, write_and_parse):
    page = write_and_parse(make_entry(tmp_path, log_probability=-3.5, finished=False, cider=12.34))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "dog", "id"}
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert all(link.startswith("data:") for link in links)
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "Point at a word" not in text, "there is no attention to see"
    assert "url(" not in text and "http" not in text
    assert {"a & b", "<heading>", "one dog", "<script>"} <= set(page.text)
    assert "<id> · log-probability -3.50 · unfinished · CIDEr-D 12.3" in page.text


def test_the_map_of_a_word_is_transparent_where_attention_is_high(tmp_path, write_and_parse):
    attention = torch.zeros(2, 6)
    attention[0, 4], attention[1, 0], attention[1, 1] = 0.9, 0.5, 0.25
    page = write_and_parse(make_entry(tmp_path, attention=attention, grid=(2, 3), sentinel=[0.1, 0.25]))
    assert any(text.startswith("Point at a word") for text in page.text)
    photo, *maps = (decode_image(attributes["src"]) for tag, attributes in page.elements if tag == "img")
    assert photo.size == (256, 128)
    alpha = [np.asarray(image)[..., 1] for image in maps]
    assert alpha[0].tolist() == [[217, 217, 217], [217, 0, 217]]
    assert alpha[1][0].tolist() == [0, 108, 217]
    tooltips = [attributes.get("title", "") for tag, attributes in page.elements if tag == "b"]
    assert [tooltip[:6] for tooltip in tooltips] == ["β 0.10", "β 0.25"]


def test_words_from_habit_are_pale(tmp_path, write_and_parse):
    for fields in ({}, {"attention": torch.ones(2, 4), "grid": (2, 2)}):
        page = write_and_parse(make_entry(tmp_path, evidence=[-0.5, 3.25], probability=0.625, **fields))
        styles = [attributes["style"] for tag, attributes in page.elements if tag == "span"]
        assert styles == ["opacity:0.35", "opacity:1.00"]
        titles = [attributes["title"] for tag, attributes in page.elements if "title" in attributes]
        assert [title[:14] for title in titles] == ["evidence -0.50", "evidence +3.25"]
        assert "<id> · probability 62%" in page.text and "<b>dog" in page.text


def test_chinese_words_are_joined_without_spaces(tmp_path, write_and_parse):
    assert "狗奔跑" in write_and_parse(make_entry(tmp_path, words=["狗", "奔跑"]), language="zh").text


def test_a_photo_that_cannot_be_read_is_replaced_by_the_reason(tmp_path, write_and_parse):
    (tmp_path / "photo.png").unlink()
    page = write_and_parse(make_entry(tmp_path, attention=torch.ones(2, 4), grid=(2, 2)))
    assert any(text.endswith("photo.png: no such file") for text in page.text)


def test_the_worst_and_best_captions_have_the_lowest_and_highest_scores_and_do_not_overlap(tmp_path):
    entries = [make_entry(tmp_path, cider=float(score)) for score in (3, 1, 4, 5, 9, 2, 6)]
    (worst, low), (best, high) = worst_and_best(entries)
    assert (worst, best) == ("The 3 worst", "The 3 best")
    assert [entry.cider for entry in low] == [1, 2, 3] and [entry.cider for entry in high] == [9, 6, 5]
    assert [len(section) for _, section in worst_and_best(entries * 20)] == [50, 50]
