"""The dashboard: windows from log.jsonl, a real visdom server that dies and comes back, and its page in a browser."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import extract_features
import train
from captioning.errors import UserError
from captioning.runtime.command_line import parse
from captioning.viewing import dashboard, visdom_server
from captioning.viewing.attention_plots import Entry, draw_card
from captioning.viewing.dashboard import LogTailer, Sender, compared, read_log, windows
from config import DASHBOARD_URL, Dashboard, ExtractFeatures, Train
from tests.small import make_small_data

HOUSE = Path(__file__).parents[1]
TINY = {"embedding_size": 16, "attention_size": 16, "hidden_size": 24, "batch_size": 8, "precision": "float32"}
CAPTION, EVIL = "一个男人在骑马", "<script>alert(1)</script><img src=x onerror=alert(2)>"


def a_log(epochs=2, steps=3, caption=CAPTION, picture=None):
    events = [{"event": "start", "time": "now", "versions": {"torch": "2"}, "config": {"run": "att", "seed": EVIL}}]
    for epoch in range(1, epochs + 1):
        events += [
            {
                "event": "step",
                "epoch": epoch,
                "step": step,
                "of": steps,
                "loss": 5 / epoch,
                "captions_per_second": 100.0,
                "waiting": 0.01,
            }
            for step in range(1, steps + 1)
        ]
        entry = {"id": "1.jpg", "caption": caption, "references": [EVIL, "一匹马"], "picture": picture}
        events.append(
            {
                "event": "epoch",
                "epoch": epoch,
                "learning_rate": 4e-4,
                "train_loss": 5 / epoch,
                "val_loss": 3.0,
                "top5": 0.5,
                "BLEU-4": 10.0,
                "CIDEr-D": 30.0 + epoch,
                "panel": [entry],
            }
        )
    return events


def write_log(folder, events):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in events]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")


# ---- windows, without a server


def test_every_curve_of_a_run_is_in_its_windows(tmp_path):
    shown = windows(a_log(), tmp_path)
    train_loss, validation = shown["loss"]["data"]
    assert train_loss["x"] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]) and train_loss["y"][-1] == 2.5
    assert validation["x"] == [1, 2] and validation["y"] == [3.0, 3.0]
    assert shown["top-5 accuracy, %"]["data"][0]["y"] == [50.0, 50.0]
    assert [curve["name"] for curve in shown["scores of captions generated freely"]["data"]] == ["BLEU-4", "CIDEr-D"]
    assert [curve["name"] for curve in shown["learning rate"]["data"]] == ["decoder"]
    tuned = [{**event, "encoder_learning_rate": 1e-4} for event in a_log()]
    assert [curve["name"] for curve in windows(tuned, tmp_path)["learning rate"]["data"]] == ["decoder", "encoder"]
    assert windows([], tmp_path)["loss"]["data"][0]["x"] == [], "a run that has just begun"
    assert {"learning rate", "captions a second", "waiting for data, %", "settings", "photo 1"} <= set(shown)


def test_a_run_of_quick_epochs_shows_their_means(tmp_path):
    for steps in (0, 1):
        events = [event for event in a_log() if event["event"] != "step"] + a_log(steps=1)[1 : 1 + steps]
        assert windows(events, tmp_path)["loss"]["data"][0]["y"] == [5.0, 2.5]


@pytest.mark.parametrize("steps", [1, 599, 600, 601, 8640, 100_000])
def test_a_long_run_does_not_grow_the_page(tmp_path, steps):
    curve = windows(a_log(epochs=1, steps=steps), tmp_path)["loss"]["data"][0]
    assert min(steps, dashboard.POINTS / 2) <= len(curve["x"]) <= dashboard.POINTS
    assert curve["x"][-1] == 1.0 and curve["x"] == sorted(curve["x"])


def test_text_is_escaped_wherever_it_comes_from(tmp_path):
    shown = windows(a_log(caption=EVIL), tmp_path)
    for name in ("photo 1", "settings"):
        content = shown[name]["data"][0]["content"]
        assert "<script" not in content and "<img src=x" not in content and "&lt;script&gt;" in content
    names = [curve["name"] for curve in compared({"<b>": a_log(), "b": a_log()})["loss"]["data"]]
    assert names == ["&lt;b&gt;: train", "&lt;b&gt;: validation", "b: train", "b: validation"]


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path):
    write_log(tmp_path, a_log())
    whole = read_log(tmp_path)
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "ep')
    assert read_log(tmp_path) == whole


@pytest.mark.parametrize("content", [None, "no json\n"])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, content):
    if content:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(UserError, match="log.jsonl") as error:
        dashboard.main(Dashboard(replay=tmp_path))
    assert "\n" not in str(error.value)


def test_the_flag_may_stand_alone():
    def url(*flags):
        return parse(Train, ["data/x", "--run", "a", *flags]).dashboard

    assert url() is None and url("--dashboard") == url("--dashboard", "--epochs", "3") == DASHBOARD_URL
    assert url("--dashboard", "http://there:1") == "http://there:1"
    with pytest.raises(UserError, match="there: is no URL"):
        Sender("there", "x")


# ---- the scripts of the page


def fake_npm(folder, version=None):
    """An npm that packs what SOURCES asks for, without a network."""
    packed = folder / "packed"
    packed.mkdir()
    for source in visdom_server.SOURCES:
        with tarfile.open(packed / f"{source.package}@{source.version}.tgz", "w:gz") as archive:
            files = {path: f"{source.package} {path}".encode() for path in source.paths}
            for path, content in {
                **files,
                "package.json": json.dumps({"version": version or source.version}).encode(),
            }.items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\ncp "{packed}/$3.tgz" packed.tgz\n')
    npm.chmod(0o755)
    return str(npm)


def no_network(*_, **__):
    raise OSError("no network")


def test_the_scripts_come_from_npm_where_the_cdn_does_not_answer_and_are_fetched_once(tmp_path, monkeypatch):
    asked = []
    npm = fake_npm(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: asked.append(url) or no_network())
    monkeypatch.setattr(shutil, "which", lambda name: npm)
    visdom_server.fetch_page(tmp_path / "static")
    assert len(asked) == 1, "a CDN that does not answer is asked once"
    for source in visdom_server.SOURCES:
        for path, to in source.paths.items():
            assert (tmp_path / "static" / to).read_text() == f"{source.package} {path}"
    monkeypatch.setattr(subprocess, "run", no_network)
    visdom_server.fetch_page(tmp_path / "static")


def test_a_package_of_another_version_is_not_used(tmp_path, monkeypatch):
    npm = fake_npm(tmp_path, version="9.9.9")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(shutil, "which", lambda name: npm)
    with pytest.raises(UserError, match="brought 9.9.9"):
        visdom_server.fetch_page(tmp_path / "static")
    assert not (tmp_path / "static").exists()


def test_without_cdn_and_npm_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no network; npm is not installed.*once.*start again") as error:
        visdom_server.fetch_page(tmp_path / "static")
    assert "\n" not in str(error.value)


def test_without_visdom_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="visdom is not installed; run: make dashboard"):
        dashboard.main(Dashboard())


# ---- a real server


def a_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """visdom in a process of its own."""

    def __init__(self, port, folder, host="127.0.0.1"):
        self.url = f"http://127.0.0.1:{port}"
        code = (
            "import pathlib, captioning.viewing.visdom_server as s\n"
            f"s.serve({host!r}, {port}, pathlib.Path({str(folder)!r}))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=HOUSE,
            text=True,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "HOME": str(folder)},
        )
        self.said = ""
        while "Ctrl-C ends it" not in self.said:
            line = self.process.stdout.readline()
            assert line, "the server ended"
            self.said += line

    def windows(self, environment):
        message = json.dumps({"win": None, "eid": environment}).encode()
        with urllib.request.urlopen(f"{self.url}/win_data", message, timeout=10) as answer:
            return json.loads(answer.read())

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path):
    if importlib.util.find_spec("visdom") is None:
        pytest.skip("visdom is not installed: the extra named dashboard")
    server = Server(a_free_port(), tmp_path / "visdom")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard")
    make_small_data(folder)
    before = os.getcwd()
    os.chdir(folder)
    extract_features.main(ExtractFeatures(Path("data/small"), "resnet18.layer2", "random", 64, workers=0))
    yield folder
    os.chdir(before)


def test_a_replayed_run_is_read_back_from_the_server_whole(server, tmp_path, capsys):
    write_log(tmp_path / "checkpoints" / "att", a_log())
    dashboard.main(Dashboard(replay=tmp_path / "checkpoints" / "att", url=server.url))
    assert f"{server.url}/env/att" in capsys.readouterr().out
    back = server.windows("att")
    for name, window in windows(a_log(), tmp_path).items():
        content = back[name]["content"]
        assert content == (
            window["data"][0]["content"]
            if back[name]["type"] == "text"
            else {"data": window["data"], "layout": window["layout"]}
        )
    assert CAPTION in back["photo 1"]["content"]
    assert (tmp_path / "visdom" / "att.json").exists(), "the environment is kept"


def test_runs_are_laid_over_one_another(server, tmp_path):
    for name in ("att", "lstm"):
        write_log(tmp_path / name, a_log())
    dashboard.main(Dashboard(compare=(tmp_path / "att", tmp_path / "lstm"), url=server.url))
    names = [curve["name"] for curve in server.windows("att and lstm")["loss"]["content"]["data"]]
    assert names == ["att: train", "att: validation", "lstm: train", "lstm: validation"]


def test_a_server_that_dies_in_the_middle_of_a_run_and_returns_empty_is_whole_again(
    server, here, tmp_path, monkeypatch, capsys
):
    """Training goes on undisturbed: the very same losses as a run that nobody watches."""
    monkeypatch.setattr(dashboard, "EVERY", 0.05)
    port = int(server.url.rpartition(":")[2])
    epochs_of, servers = [], [server]
    plain = train.Trainer.validate

    def disturb(self, stop):
        epochs_of.append(len(epochs_of))
        if len(epochs_of) == 3:
            wait_for(lambda: server.windows("watched")["loss"])
            server.kill()
        if len(epochs_of) == 5:
            time.sleep(0.5)  # the thread meets the dead server
            servers.append(Server(port, tmp_path / "another"))
        return plain(self, stop)

    monkeypatch.setattr(train.Trainer, "validate", disturb)
    train.main(Train(Path("data/small"), "watched", epochs=6, dashboard=server.url, **TINY))
    monkeypatch.setattr(train.Trainer, "validate", plain)
    try:
        back = servers[1].windows("watched")
    finally:
        servers[1].kill()
    said = capsys.readouterr().out
    assert said.count("does not answer") == said.count("answers again") == 1
    assert back["loss"]["content"]["data"][1]["x"] == [1, 2, 3, 4, 5, 6]
    assert "data:image/png;base64," in back["photo 1"]["content"] and "a white square" in back["photo 1"]["content"]
    train.main(Train(Path("data/small"), "alone", epochs=6, **TINY))
    losses = [
        [event["val_loss"] for event in read_log(Path("checkpoints") / run) if event["event"] == "epoch"]
        for run in ("watched", "alone")
    ]
    assert losses[0] == losses[1]


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, KeyError, ValueError):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def test_a_server_that_never_answers_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard, "PATIENCE", 1.0)
    write_log(tmp_path / "run", a_log())
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began = time.monotonic()
        with LogTailer(tmp_path / "run", f"http://127.0.0.1:{deaf.getsockname()[1]}"):
            looked = time.monotonic() - began
            time.sleep(0.3)
        assert looked < 1.0 and time.monotonic() - began < 20
    assert threading.active_count() < 20


def test_another_host_than_this_one_is_announced_loudly(tmp_path):
    if importlib.util.find_spec("visdom") is None:
        pytest.skip("visdom is not installed: the extra named dashboard")
    server = Server(a_free_port(), tmp_path, host="0.0.0.0")
    server.kill()
    assert "WARNING" in server.said and "no password" in server.said


def test_by_default_it_listens_to_this_machine_alone(server):
    assert Dashboard().host == "127.0.0.1" and "WARNING" not in server.said
    if Path("/proc/net/tcp").exists():  # what the system says of its sockets: address:port in hexadecimal
        port = f":{int(server.url.rpartition(':')[2]):04X}"
        lines = [line.split() for net in ("tcp", "tcp6") for line in open(f"/proc/net/{net}")]
        assert {line[1] for line in lines if line[1].endswith(port) and line[3] == "0A"} == {"0100007F" + port}


# ---- the page, in a browser


@pytest.fixture
def browser():
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("no chromium and chromedriver here: apt install chromium chromium-driver")
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("selenium is not installed: the extra named test")
    static = visdom_server.static_folder()
    if not all((static / to).exists() for source in visdom_server.SOURCES for to in source.paths.values()):
        pytest.skip("the scripts of visdom's page are not here yet: make dashboard fetches them")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    offline = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1300",
        offline,
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(driver))
    yield driver
    driver.quit()


def test_the_page_shows_the_curve_the_caption_and_the_strip_offline(server, browser, tmp_path):
    from selenium.common.exceptions import NoAlertPresentException

    words, run = ["一个", "男人", "骑马"], tmp_path / "att"
    attention = np.eye(196, dtype=np.float32)[[20, 80, 150]]
    draw_card(Entry(Image.new("RGB", (90, 60), "green"), CAPTION, words, attention, (14, 14)), run / "pictures/1.png")
    write_log(run, a_log(caption=CAPTION + EVIL, picture="pictures/1.png"))
    dashboard.main(Dashboard(replay=run, url=server.url))
    browser.get(f"{server.url}/env/att")
    look = browser.execute_script
    wait_for(lambda: look("return document.querySelectorAll('.window .scatterlayer .trace').length") >= 2)
    wait_for(lambda: CAPTION in look("return document.body.innerText"))
    wait_for(
        lambda: look(
            "return [...document.images].some(i => i.src.startsWith('data:image/png') && i.naturalWidth > 900)"
        )
    )
    assert EVIL in look("return document.body.innerText"), "shown, not run"
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()
    assert browser.save_screenshot(str(tmp_path / "page.png")) and Image.open(tmp_path / "page.png").width > 1000
    missing = [entry for entry in browser.get_log("browser") if re.search(r"static/.*\b(404|Failed)", entry["message"])]
    assert not missing
