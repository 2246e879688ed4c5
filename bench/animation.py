"""Record the animation of the README: a photo is dropped on the page, captioned, and the mouse points at words.

    make demo LANGUAGE=en
    python -m captioning.calibrate checkpoints/scenes-en
    python -m captioning.export checkpoints/scenes-en --format web --out site
    python bench/animation.py site data/scenes-en/photos/test-0-00013.png docs/web.webp --words 1 6 8

It is the real page in Chromium, with a real drop and real moves of the mouse; only the arrow of the mouse and the photo
beneath it are drawn here, since screenshots do not have them, and time is stopped for each picture. Needs chromium and
chromedriver, and the extras serve and test.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw
from tyro.conf import Positional

sys.path.append(str(Path(__file__).parents[1]))  # of a script, Python looks in its own folder alone
from bench.web import Page, browser, served  # noqa: E402

SIZE = 1100, 740  # of the page: the caption is beside the photo
THUMBNAIL = 110  # pixels of the photo under the mouse
SETTLE_SECONDS = 0.5  # longer than any transition of style.css
ARROW = [(0, 0), (0, 17), (4, 13), (7, 20), (10, 19), (7, 12), (12, 12)]
SHARPNESS = 4  # the arrow is drawn so many times larger, then made smaller, for smooth edges
# The page waits this long between two words (app.js): here for the next picture instead
STOP_TIME = """
const start = setTimeout;
window.setTimeout = (call, milliseconds, ...rest) =>
  milliseconds === 220 ? (window.nextWord = call) : start(call, milliseconds, ...rest);
"""


@dataclass(frozen=True)
class Animation:
    site: Positional[Path]  # written by captioning.export --format web
    photo: Positional[Path]
    out: Positional[Path]  # .webp
    words: tuple[int, ...] = ()  # those pointed at, from 0; else the three of most evidence
    language: Literal["en", "zh"] = "en"  # of the page
    quality: int = 80  # of WebP


@dataclass
class Film:
    """Pictures, and how many milliseconds each is shown. The mouse is drawn where it is."""

    driver: Any
    mouse: tuple[float, float] = (SIZE[0] - 60, SIZE[1] - 30)
    carried: Image.Image | None = None  # under the mouse
    pictures: list[Image.Image] = field(default_factory=list)
    milliseconds: list[int] = field(default_factory=list)
    screen: Image.Image = field(init=False)  # the page as it was last

    def take(self, milliseconds: int) -> None:
        """Take a picture of the page as it is now."""
        self.screen = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        self._add(milliseconds)

    def move(self, goal: tuple[float, float], steps: int, at: Callable[[int], None] | None = None) -> None:
        """Move the mouse; the page is as it was before, unless at(step) has changed it."""
        start = self.mouse
        for step in range(1, steps + 1):
            fraction = (1 - np.cos(np.pi * step / steps)) / 2  # slow at both ends
            self.mouse = tuple(a + fraction * (b - a) for a, b in zip(start, goal, strict=True))
            if at:
                at(step)
                self.take(60)
            else:
                self._add(60)

    def _add(self, milliseconds: int) -> None:
        picture = self.screen.copy()
        x, y = map(round, self.mouse)
        if self.carried:
            picture.paste(self.carried, (x - THUMBNAIL // 2, y - THUMBNAIL // 2))
        draw_arrow(picture, x, y)
        self.pictures.append(picture)
        self.milliseconds.append(milliseconds)

    def save(self, path: Path, quality: int) -> None:
        """Write an animated WebP that repeats."""
        first, *others = self.pictures
        first.save(
            path, save_all=True, append_images=others, duration=self.milliseconds, loop=0, quality=quality, method=4
        )


def draw_arrow(picture: Image.Image, x: int, y: int) -> None:
    """Draw the mouse's arrow, black with a white outline, its point at (x, y)."""
    width, height = 16, 24
    inside, around = (Image.new("L", (SHARPNESS * width, SHARPNESS * height)) for _ in range(2))
    points = [(SHARPNESS * (px + 2), SHARPNESS * (py + 2)) for px, py in ARROW]
    ImageDraw.Draw(inside).polygon(points, 255)
    ImageDraw.Draw(around).polygon(points, 255)
    ImageDraw.Draw(around).line([*points, points[0]], 255, 3 * SHARPNESS)
    for colour, shape in (("white", around), ("black", inside)):
        picture.paste(colour, (x - 2, y - 2), shape.resize((width, height), Image.Resampling.LANCZOS))


def main(animation: Animation) -> None:
    with served(animation.site) as url, browser(SIZE, motion=True) as driver:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": STOP_TIME})
        page = Page(driver, url)
        page.wait(lambda: page.count("#loading[hidden]") and "threads" in page.text("about"))
        if animation.language == "zh":
            driver.execute_script("document.getElementById('language').click()")
        film = Film(driver)
        drop_photo(film, animation.photo)
        show_words(film, page)
        for box in boxes_of_words(page, animation.words):
            film.move(box, steps=6)
            driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": box[0], "y": box[1]})
            time.sleep(SETTLE_SECONDS)
            film.take(1500)
    film.save(animation.out, animation.quality)
    seconds, size = sum(film.milliseconds) / 1000, animation.out.stat().st_size
    print(f"{animation.out}: {len(film.pictures)} pictures, {seconds:.1f} s, {size / 1e3:.0f} KB")


def drop_photo(film: Film, photo: Path) -> None:
    """Carry the photo to the page and drop it."""
    film.carried = Image.open(photo).convert("RGB").resize((THUMBNAIL, THUMBNAIL))
    film.take(900)
    data = {"items": [], "files": [str(photo.resolve())], "dragOperationsMask": 1}

    def drag(step: int, kind: str = "dragOver") -> None:
        x, y = film.mouse
        if step == 1:
            kind = "dragEnter"
        film.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": data})

    film.move((SIZE[0] / 2, SIZE[1] / 2), steps=12, at=drag)
    drag(0, "drop")
    film.carried = None


def show_words(film: Film, page: Page) -> None:
    """Let the words of the caption appear, one a picture."""
    page.wait(lambda: page.count(".word.appearing"))
    while not page.count("#caption.complete"):
        time.sleep(SETTLE_SECONDS)
        film.take(300)
        page.driver.execute_script("nextWord()")
    time.sleep(SETTLE_SECONDS)
    film.take(1500)


def boxes_of_words(page: Page, words: tuple[int, ...]) -> Iterator[tuple[float, float]]:
    """The middles of words on the page."""
    evidence, _ = page.judgement()
    strongest = sorted(np.argsort(evidence)[-3:]) if evidence else [1]
    for word in words or strongest:
        yield page.middle_of(int(word))


if __name__ == "__main__":
    main(tyro.cli(Animation))
