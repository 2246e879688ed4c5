"""Attention plots: the glow is where the attention is, every letter is drawn, and no display is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont, ImageSequence

from captioning.viewing import fonts
from captioning.viewing.attention_plots import (
    BACKGROUND,
    GAP,
    MARGIN,
    MARKS,
    PANEL,
    CaptionedImage,
    animate_attention,
    contact_sheet,
    draw_attention,
    overlay,
)
from captioning.viewing.fonts import find_font

GRIDS = [(7, 7), (8, 8), (14, 14), (5, 9)]
WHITE = Image.new("RGB", (180, 120), "white")
DEJAVU = next((path for path in fonts._font_files() if Path(path).name == "DejaVuSans.ttf"), "")


def uniform(words: int, grid: tuple[int, int]) -> np.ndarray:
    """Attention (T, P) that is the same for all cells."""
    return np.full((words, grid[0] * grid[1]), 1 / (grid[0] * grid[1]), np.float32)


def captioned(words=("a",), grid=(7, 7), attention=None, image=WHITE, caption="", **options) -> CaptionedImage:
    attention = uniform(len(words), grid) if attention is None else attention
    return CaptionedImage(image, caption, words, attention, grid, **options)


def chinese_font():
    try:
        return find_font("绿色草地上")
    except LookupError:
        pytest.skip("no font on this machine has Chinese letters")


@pytest.fixture
def only_dejavu(monkeypatch):
    monkeypatch.setattr(fonts, "_font_files", lambda: (DEJAVU,))
    fonts._find_font.cache_clear()
    yield
    fonts._find_font.cache_clear()


@given(st.data(), st.sampled_from(GRIDS))
def test_the_brightest_pixel_is_in_the_most_attended_cell(data, grid):
    row, column = (data.draw(st.integers(0, cells - 1)) for cells in grid)
    attention = np.full(grid, 0.01)
    attention[row, column] = 1
    light = np.asarray(overlay(WHITE, attention), float).sum(-1)
    y, x = np.argwhere(light == light.max()).mean(0)
    assert row <= (y + 0.5) / WHITE.height * grid[0] <= row + 1
    assert column <= (x + 0.5) / WHITE.width * grid[1] <= column + 1


def test_uniform_attention_lights_the_photo_evenly_and_no_attention_dims_it():
    lit, dim = (np.asarray(overlay(WHITE, np.full((14, 14), weight))) for weight in (1 / 196, 0))
    assert np.ptp(lit.reshape(-1, 3), axis=0).max() <= 1 and lit.mean() > 230
    assert dim.max() < 128


@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_and_any_number_of_words_can_be_drawn(tmp_path, times, grid):
    for count in (0, 1, 4, 52):
        item = captioned(["word"] * count, grid, caption="a title")
        draw_attention(item, tmp_path / "a.png")
        page = Image.open(tmp_path / "a.png")
        page.load()
        assert max(page.size) < 2300 and page.getpixel((2, 2)) == BACKGROUND
        if count <= times(4, 52):  # a GIF of 52 words takes seconds
            animate_attention(item, tmp_path / "a.gif")
            assert Image.open(tmp_path / "a.gif").n_frames == count + 1
        assert sorted(os.listdir(tmp_path)) == ["a.gif", "a.png"]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 60, 3), np.uint8),
        Image.new("L", (5000, 6)),
        Image.new("RGBA", (20, 400)),
        Image.new("RGB", (1, 1)),
    ],
)
def test_images_of_any_shape_and_mode_can_be_drawn(tmp_path, image):
    draw_attention(captioned(image=image), tmp_path / "a.png")
    contact_sheet([captioned(image=image, caption="a")], tmp_path / "b.png", "title")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


def test_a_palette_image_is_drawn_like_its_rgb_version(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8)
    image = Image.fromarray(noise).convert("P")
    for name, version in (("palette", image), ("plain", image.convert("RGB"))):
        draw_attention(captioned(image=version), tmp_path / f"{name}.png")
    assert (tmp_path / "palette.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_the_first_cell_of_the_attention_is_the_upper_left_corner_of_its_panel(tmp_path):
    draw_attention(captioned(grid=(5, 9), attention=np.eye(1, 45)), tmp_path / "a.png")
    page = np.asarray(Image.open(tmp_path / "a.png"), float).sum(-1)
    left, top = MARGIN + PANEL + GAP, MARGIN
    assert page[top + 10, left + 10] > 600 > 400 > page[top + 120, left + 10]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_grid_view_lights_each_cell_evenly(grid):
    attention = np.random.default_rng(0).random(grid)
    lit = np.asarray(overlay(Image.new("RGB", (10 * grid[1], 10 * grid[0]), "white"), attention, "grid"), int)
    cells = lit.reshape(grid[0], 10, grid[1], 10, 3)
    assert np.ptp(cells, axis=(1, 3)).max() == 0
    assert len(np.unique(cells[:, 0, :, 0].reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize("words, caption", [(["a", "dog", "runs"], "a dog runs"), (["狗", "在", "奔跑"], "狗在奔跑")])
def test_an_animation_shows_the_photo_and_then_one_frame_per_word(tmp_path, words, caption):
    chinese_font()
    attention = np.eye(3, 49) * [[1.0], [1.0], [0.4]]  # the last word has a beta of 0.6
    animate_attention(captioned(words, attention=attention, caption=caption), tmp_path / "a.gif")
    movie = Image.open(tmp_path / "a.gif")
    frames = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(movie)]
    assert len(frames) == 4 and movie.info["loop"] == 0 and os.listdir(tmp_path) == ["a.gif"]
    photo_rows, caption_rows = slice(0, 320), slice(332, 368)  # 180x120, enlarged to 480x320
    assert frames[0][photo_rows].min() > 250 and all(frame[photo_rows].min() < 200 for frame in frames[1:])
    middles = []  # of the dark letters in each frame
    for frame in frames[1:]:
        dark = np.flatnonzero((frame[caption_rows].sum(-1) < 200).any(0))
        middles.append(dark.mean())
    assert middles == sorted(middles) and len(set(middles)) == 3
    beta = slice(-24, None), slice(400, None)
    assert [bool((frame[beta].sum(-1) < 600).any()) for frame in frames] == [False, False, False, True]


def test_words_from_habit_are_paler_than_words_from_the_photo(tmp_path):
    darkest = {}
    for name, evidence in {"habit": [-1.0], "between": [1.0], "photo": [5.0], "unknown": None}.items():
        draw_attention(captioned(words=["WWW"], evidence=evidence), tmp_path / "a.png")
        page = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
        label = page[:, MARGIN + PANEL + GAP : MARGIN + PANEL + GAP + 60][-60:]  # below the panel; left of the figure
        darkest[name] = int(label.min())
    assert darkest["habit"] > darkest["between"] + 20 > darkest["photo"] + 40
    assert darkest["photo"] == darkest["unknown"]


def test_attention_of_the_wrong_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"attention \(2, 49\): 2 words on a grid of \(8, 8\) need \(2, 64\)"):
        draw_attention(captioned(["a", "b"], (8, 8), uniform(2, (7, 7))), tmp_path / "a.png")


def test_no_display_and_no_matplotlib_are_needed(tmp_path):
    script = (
        "import sys, numpy, pathlib; from PIL import Image\n"
        "from captioning.viewing.attention_plots import CaptionedImage, draw_attention\n"
        "item = CaptionedImage(Image.new('RGB', (64, 64)), '', ['a'], numpy.ones((1, 49)), (7, 7))\n"
        "draw_attention(item, pathlib.Path(sys.argv[1]))\n"
        "assert not {'matplotlib.pyplot', 'matplotlib', 'tkinter'} & set(sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, "-c", script, str(tmp_path / "a.png")]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[1])
    assert (tmp_path / "a.png").exists()


def test_every_chinese_letter_has_its_own_shape_in_the_font_found():
    font = chinese_font()
    loaded = ImageFont.truetype(font.path, 24, font.face)
    missing = bytes(loaded.getmask("\U0010fffe"))  # how the font draws a missing letter
    assert all(
        bytes(loaded.getmask(letter)) != missing for letter in "绿色草地上一个大的红圆形在蓝小星左边看图说话，。"
    )


def test_a_font_that_draws_every_letter_as_a_box_is_never_chosen():
    files = fonts._font_files()
    assert files and not any("lastresort" in path.lower() for path in files)


def test_fonts_of_the_system_and_of_packages_are_found_below_their_folders(tmp_path, monkeypatch):
    for name in ("system/deep/DejaVuSans.ttf", "xdg/fonts/NotoSansCJK.ttc", "xdg/fonts/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(fonts, "SYSTEM_FOLDERS", (str(tmp_path / "system"), str(tmp_path / "missing")))
    monkeypatch.setattr(fonts, "PACKAGE_FOLDERS", {"no_such_package": "fonts"})
    monkeypatch.setenv("XDG_DATA_DIRS", f"{tmp_path / 'xdg'}:")
    expected = (str(tmp_path / "xdg/fonts/NotoSansCJK.ttc"), str(tmp_path / "system/deep/DejaVuSans.ttf"))
    assert fonts._font_files.__wrapped__() == expected, "preferred fonts first"


def test_a_missing_font_is_one_line_that_names_what_to_install(only_dejavu):
    with pytest.raises(LookupError, match="pip install mplfonts, or: apt install fonts-noto-cjk") as raised:
        find_font("绿色的草地")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["a dog 😀", "😀", "naïve café 狗", ""])
def test_a_rare_character_does_not_prevent_a_plot(only_dejavu, text):
    assert find_font(text).path == DEJAVU


def test_a_font_collection_gives_the_face_for_simplified_chinese(tmp_path):
    from fontTools.ttLib import TTCollection, TTFont

    collection = TTCollection()
    for name in ("Sans JP", "Sans SC"):
        font = TTFont(DEJAVU)
        for record in font["name"].names:
            record.string = name
        collection.fonts.append(font)
    collection.save(tmp_path / "sans.ttc")
    faces = fonts._read_faces(str(tmp_path / "sans.ttc"))
    assert [face for face, _ in faces] == [1, 0] and all(ord("a") in characters for _, characters in faces)


def test_a_damaged_font_file_is_ignored(tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    assert fonts._read_faces(str(tmp_path / "broken.ttf")) == ()


@pytest.mark.parametrize("word", ["$a_b$", "<script>", r"\frac", "x^2", "%d", "{a}"])
def test_formulas_and_markup_are_drawn_as_plain_text(tmp_path, word):
    draw_attention(captioned([word]), tmp_path / "a.png")
    page = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), float)
    left, top = MARGIN + PANEL + GAP, MARGIN + round(PANEL * 2 / 3)
    label = page[top + 4 : top + 40, left : left + PANEL - 45]  # below the panel, without the percentage
    inked = np.flatnonzero((np.abs(label - BACKGROUND).sum(-1) > 60).any(0))
    expected = fonts.load_font(find_font(word), 19).getbbox(word)
    assert abs(inked[0] - expected[0]) <= 1 and abs(inked[-1] + 1 - expected[2]) <= 1


@given(st.text(st.sampled_from("ab 绿色，。\n\t$") | st.characters(codec="utf-8"), max_size=80), st.integers(60, 400))
def test_wrapped_text_keeps_every_letter_and_stays_within_the_width(text, width):
    font = fonts.load_font(fonts.Font(DEJAVU, 0), 20)
    lines = fonts.wrap_text(text, font, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(line and font.getlength(line) <= width for line in lines)


def test_a_word_too_long_for_its_panel_is_shrunk_and_then_truncated():
    font = fonts.Font(DEJAVU, 0)
    assert fonts.fit_text("skateboarding", font, 19, 120)[0] == "skateboarding"
    word, word_font = fonts.fit_text("Donaudampfschifffahrtsgesellschaft", font, 19, 80)
    assert word.endswith("...") and word_font.getlength(word) <= 80 and word_font.size == fonts.MIN_SIZE


@pytest.mark.parametrize("correct", [True, False, None])
def test_a_card_has_a_mark_if_its_caption_is_known_to_be_correct_or_wrong(tmp_path, correct):
    item = CaptionedImage(WHITE, "a dog", ["a", "dog"], None, (7, 7), correct)
    contact_sheet([item], tmp_path / "a.png", "title")
    colours = {colour for _, colour in Image.open(tmp_path / "a.png").getcolors(1 << 20)}
    assert {mark for mark, colour in MARKS.items() if colour in colours} == {correct} - {None}
    assert np.argmax(MARKS[True]) == 1 and np.argmax(MARKS[False]) == 0  # green, red


def test_a_contact_sheet_shows_one_panel_per_word(tmp_path):
    words = ["a", "dog", "on", "grass"]
    without_attention = CaptionedImage(WHITE, "a dog", ["a"], None, (7, 7))
    contact_sheet([captioned(words, caption=" ".join(words)), without_attention], tmp_path / "a.png", "title")
    page = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    lit = np.asarray(overlay(WHITE, np.ones((7, 7))))[0, 0]
    columns = (np.abs(page - lit).sum(-1) == 0).sum(0) > 30
    assert (np.diff(columns.astype(int)) == 1).sum() == len(words)


def test_a_plot_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError("no space left")

    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        draw_attention(captioned(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.png"]
