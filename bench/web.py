"""A page in a real browser: are its captions those of generate.py, and how many seconds does a photo take?

    python -m captioning.export checkpoints/att --format web --out site
    python bench/web.py checkpoints/att site --data data/f8k-zh --photos 100

Chromium, or --browser firefox, opens the page without a network and is given validation photos. Their captions, and the
beams that the page shows beside them, are compared with Kantu's in float32, and so are evidence and probability. Needs
chromium and chromedriver, or firefox, and the extras serve and test.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import tyro
from tyro.conf import Positional

from captioning import serve
from captioning.caption import CaptionResult
from captioning.captioner import DEFAULT_SEARCH, Captioner
from captioning.dataset.caption_dataset import photos_in_split
from captioning.search.options import SearchOptions
from preprocess.captions import read_captions

sys.path.append(str(Path(__file__).parents[1]))  # of a script, Python looks in its own folder alone
from bench.firefox import firefox  # noqa: E402

OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", OFFLINE)
DEVICE_FLAGS = {
    "cpu": ("--disable-gpu",),
    "gpu": (
        "--enable-unsafe-webgpu",
        "--use-webgpu-adapter=swiftshader",
        "--enable-features=Vulkan",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
    ),
}
TIMEOUT = 600  # seconds to load the model, and for each photo
Judgement = tuple[list[float], float | None]  # evidence of the words of a caption, and its probability


@dataclass(frozen=True)
class Bench:
    run: Positional[Path]
    site: Positional[Path]
    data: Path  # a data folder; its validation photos are captioned
    photos: int = 100
    picture: Path | None = None  # write a screenshot of the first photo here
    word: int = 1  # that the screenshot points at
    size: tuple[int, int] = (1280, 800)  # of the window, in pixels; less than 600 is a phone
    device: Literal["cpu", "gpu"] = "cpu"  # gpu: WebGPU on SwiftShader, an imitation of a GPU: minutes for each photo
    browser: Literal["chromium", "firefox"] = "chromium"  # firefox: --device cpu alone


def main(bench: Bench) -> None:
    dataset = list(read_captions(bench.data))
    photos = [photo.image for photo in photos_in_split(dataset, "val", bench.data, bench.photos)]
    opened = firefox(bench.size) if bench.browser == "firefox" else browser(bench.size, bench.device)
    kind = FirefoxPage if bench.browser == "firefox" else Page
    with served(bench.site) as url, opened as driver:
        page = kind(driver, f"{url}?device={bench.device}")
        page.add(photos[:1])  # waits for the model
        before = cpu_seconds(page.process)
        page.add(photos[1:])
        cpu = cpu_seconds(page.process) - before
        found, judged = [], []
        for number in range(len(photos)):
            found.append(page.captions(number))
            judged.append(page.judgement())
        seconds = [page.seconds(number) for number in range(len(photos))]
        if bench.picture:
            page.captions(0)
            page.point_at(bench.word)
            driver.save_screenshot(str(bench.picture))
        print(page.text("about"))
    captioner = Captioner.load(bench.run, "cpu", "float32")
    search = SearchOptions(num_captions=DEFAULT_SEARCH.beam_size)
    results = captioner.caption(photos, search)
    beams = [[result.text, *(other.text for other in result.others)] for result in results]
    same = sum(expected[0] == captions[0] for expected, captions in zip(beams, found, strict=True))
    same_beams = sum(expected == captions for expected, captions in zip(beams, found, strict=True))
    print(f"{same} of {len(photos)} captions are Kantu's; all {search.num_captions} beams of {same_beams} photos")
    if captioner.calibration:
        pairs = zip(judged, results, beams, found, strict=True)
        print_differences([(one, other) for one, other, expected, captions in pairs if expected[0] == captions[0]])
    print(f"{median(seconds):.2f} s a photo (median; slowest {max(seconds):.2f} s)")
    print(f"{cpu / (len(photos) - 1):.2f} CPU seconds a photo, of all processes of the browser")


def print_differences(pairs: Sequence[tuple[Judgement, CaptionResult]]) -> None:
    """How far the page's evidence of words and probability of captions are from Kantu's."""
    evidence = np.concatenate([np.subtract(one[0], other.evidence) for one, other in pairs])
    print(
        f"evidence of {len(evidence)} words: differs by {median(abs(evidence)):.4f} (largest {max(abs(evidence)):.4f})"
    )
    differences = [abs(one[1] - other.probability) for one, other in pairs if one[1] is not None]
    if differences:
        print(f"probability: differs by {median(differences):.4f} (largest {max(differences):.4f})")


def cpu_seconds(process: int) -> float:
    """CPU seconds of a process and all that it started, as Linux counts them."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text("utf-8", "replace").rpartition(")")[2].split()
            number = int(path.parent.name)
            parents[number], ticks[number] = int(fields[1]), int(fields[11]) + int(fields[12])

    def total(number: int) -> int:
        return ticks.get(number, 0) + sum(total(child) for child, parent in parents.items() if parent == number)

    return total(process) / os.sysconf("SC_CLK_TCK")


class Page:
    """The page in a browser, as a user sees it."""

    def __init__(self, driver: Any, url: str):
        self.driver = driver
        driver.get(url)

    def add(self, photos: Sequence[str | Path]) -> None:
        """Choose photos, and wait until all are captioned, or refused."""
        before = self.count("#strip button")
        self.choose([str(Path(photo).resolve()) for photo in photos])
        self.wait(lambda: self.count("#strip .done") == before + len(photos), TIMEOUT * len(photos))

    def choose(self, paths: Sequence[str]) -> None:
        """Choose files in the page's dialog."""
        self.driver.find_element("id", "photo-input").send_keys("\n".join(paths))

    def show(self, number: int) -> None:
        """Show a photo that was added, and wait for its caption or its problem."""
        self.driver.execute_script("document.querySelectorAll('#strip button')[arguments[0]].click()", number)
        self.wait(lambda: self.count("#caption.complete, #stage[hidden]"))

    def captions(self, number: int) -> list[str]:
        """All captions of a photo that was added, the best first; a problem is the only one."""
        self.show(number)
        if self.count("#stage[hidden]"):
            return [self.text("caption")]
        script = "return [...document.querySelectorAll('#alternatives button')].map(button => button.textContent)"
        return self.driver.execute_script(script)

    def judgement(self) -> Judgement:
        """The evidence of each word of the caption that is shown, and its probability; empty and None if unknown."""
        evidence = "return [...document.querySelectorAll('.word[data-evidence]')].map(word => +word.dataset.evidence)"
        probability = "return document.querySelector('#trust:not(:empty)')?.dataset.probability"
        shown = self.driver.execute_script(probability)
        return self.driver.execute_script(evidence), None if shown is None else float(shown)

    def seconds(self, number: int) -> float:
        """The seconds that a photo took."""
        script = "return Number(document.querySelectorAll('#strip button')[arguments[0]].dataset.seconds)"
        return self.driver.execute_script(script, number)

    def point_at(self, word: int) -> None:
        """Give a word of the caption the keyboard's focus, and wait until the veil is there."""
        self.driver.execute_script("document.querySelectorAll('.word')[arguments[0]].focus()", word)
        self.wait_for_veil()

    def middle_of(self, word: int) -> tuple[int, int]:
        """Where a word of the caption is in the window, in pixels."""
        box = "const box = document.querySelectorAll('.word')[arguments[0]].getBoundingClientRect(); "
        middle = "return [box.x + box.width / 2, box.y + box.height / 2].map(Math.round)"
        x, y = self.driver.execute_script(box + middle, word)
        return x, y

    def wait_for_veil(self) -> None:
        """Wait until the veil has appeared."""
        self.wait(lambda: self.driver.execute_script("return getComputedStyle(veil).opacity") == "1")

    def text(self, name: str) -> str:
        """What an element with this id says."""
        return self.driver.execute_script("return document.getElementById(arguments[0]).textContent", name)

    def count(self, selector: str) -> int:
        """The number of elements that match a selector."""
        return self.driver.execute_script("return document.querySelectorAll(arguments[0]).length", selector)

    def wait(self, condition: Any, seconds: float = TIMEOUT) -> None:
        """Wait for a condition. Raises RuntimeError, with what the page says, if it does not come true."""
        end = time.monotonic() + seconds
        while not condition():
            problem = self.text("problem")
            if problem or time.monotonic() > end:
                raise RuntimeError(problem or f"nothing happened in {seconds} seconds; {self.log()}")
            time.sleep(0.1)

    def log(self) -> list[str]:
        """What the browser has logged: errors and warnings."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[tuple[str, str]]:
        """Method and URL of every request so far, of the page and its workers."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [(request["method"], request["url"]) for request in sent]

    @property
    def process(self) -> int:
        """The id of the process that started the browser's."""
        return self.driver.service.process.pid


class FirefoxPage(Page):
    """The page in Firefox."""

    def choose(self, paths: Sequence[str]) -> None:
        self.driver.choose_files("photo-input", paths)

    def point_at(self, word: int) -> None:
        """Point at a word with the mouse: a window without a screen never has the keyboard's focus."""
        self.driver.point_at(*self.middle_of(word))
        self.wait_for_veil()

    def log(self) -> list[str]:
        return self.driver.log()

    def requests(self) -> list[tuple[str, str]]:
        return self.driver.requests()

    @property
    def process(self) -> int:
        return self.driver.process


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_server(port: int, seconds: float = 30) -> None:
    """Wait until a server answers on this port of this machine."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """Serve a site on a free port while the block runs -> its URL."""
    port = free_port()
    loop = asyncio.new_event_loop()
    application = serve.site_application(site)
    task = loop.create_task(serve.listen(application, "127.0.0.1", port, str(site)))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        wait_for_server(port)
        yield f"http://127.0.0.1:{port}/"
    finally:
        loop.call_soon_threadsafe(task.cancel)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextlib.contextmanager
def browser(size: tuple[int, int] = (1280, 800), device: str = "cpu", motion: bool = False) -> Iterator[Any]:
    """Chromium without a network, driven by selenium, while the block runs.

    device: a key of DEVICE_FLAGS. motion: words appear one after another, as for most users.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium") or shutil.which("google-chrome"))
    for flag in (*FLAGS, *DEVICE_FLAGS[device], f"--window-size={max(size[0], 600)},{size[1]}"):
        options.add_argument(flag)
    if not motion:
        options.add_argument("--force-prefers-reduced-motion")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        yield driver
    finally:
        driver.quit()


def missing() -> str:
    """What is missing to open a page here; empty if nothing is."""
    if not shutil.which("chromedriver") or not (shutil.which("chromium") or shutil.which("google-chrome")):
        return "chromium and chromedriver are not installed: apt install chromium chromium-driver"
    for package, extra in (("selenium", "test"), ("tornado", "serve")):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: the extra named {extra}"
    return ""


if __name__ == "__main__":
    main(tyro.cli(Bench))
