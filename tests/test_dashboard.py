"""The dashboard: windows built from log.jsonl, a real visdom server that dies and restarts, its page in a browser."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import multiprocessing
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
from bench.web import free_port
from captioning import dashboard as dashboard_command
from captioning.errors import UserError
from captioning.runtime.command_line import parse
from captioning.viewing import curves, dashboard, log_tailer, visdom_server
from captioning.viewing.attention_plots import CaptionedImage, draw_card
from captioning.viewing.dashboard import (
    VisdomClient,
    VisdomTailer,
    comparison_windows,
    environment_of,
    page_url,
    read_log,
    run_names,
    run_windows,
)
from config import DASHBOARD_URL, Dashboard, ExtractFeatures, Train
from tests.small import make_small_data

TINY = {"embedding_size": 16, "attention_size": 16, "hidden_size": 24, "batch_size": 8, "precision": "float32"}
CAPTION, MALICIOUS = "一个男人在骑马", "<script>alert(1)</script><img src=x onerror=alert(2)>"


def make_log(epochs=2, steps=3, caption=CAPTION, picture=None):
    """The events of a run."""
    events = [
        {"event": "start", "time": "now", "versions": {"torch": "2"}, "config": {"run": "att", "seed": MALICIOUS}}
    ]
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
        entry = {"id": "1.jpg", "caption": caption, "references": [MALICIOUS, "一匹马"], "picture": picture}
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
                "preview": [entry],
            }
        )
    return events


def write_log(folder, events):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in events]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")


# ---- windows, without a server


def test_the_windows_of_a_run_show_all_its_curves(tmp_path):
    windows = run_windows(make_log(), tmp_path)
    train_loss, validation = windows["loss"]["data"]
    assert train_loss["x"] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]) and train_loss["y"][-1] == 2.5
    assert validation["x"] == [1, 2] and validation["y"] == [3.0, 3.0]
    assert windows["top-5 accuracy, %"]["data"][0]["y"] == [50.0, 50.0]
    assert [curve["name"] for curve in windows["scores of generated captions"]["data"]] == ["BLEU-4", "CIDEr-D"]
    assert [curve["name"] for curve in windows["learning rate"]["data"]] == ["decoder"]
    fine_tuned = [{**event, "encoder_learning_rate": 1e-4} for event in make_log()]
    assert [curve["name"] for curve in run_windows(fine_tuned, tmp_path)["learning rate"]["data"]] == [
        "decoder",
        "encoder",
    ]
    assert run_windows([], tmp_path)["loss"]["data"][0]["x"] == [], "a run that has just started"
    assert {"learning rate", "captions per second", "waiting for data, %", "settings", "photo 1"} <= set(windows)


def test_a_run_with_short_epochs_shows_the_mean_loss_of_each(tmp_path):
    for steps in (0, 1):
        events = [event for event in make_log() if event["event"] != "step"] + make_log(steps=1)[1 : 1 + steps]
        assert run_windows(events, tmp_path)["loss"]["data"][0]["y"] == [5.0, 2.5]
    events = [{**event, "train_reward": 9.0} for event in make_log(steps=0)]
    assert run_windows(events, tmp_path)["reward: CIDEr-D of sampled captions"]["data"][0]["y"] == [9.0, 9.0]


@pytest.mark.parametrize("steps", [1, 599, 600, 601, 8640, 100_000])
def test_the_number_of_points_of_a_long_run_is_bounded(tmp_path, steps):
    curve = run_windows(make_log(epochs=1, steps=steps), tmp_path)["loss"]["data"][0]
    assert min(steps, curves.MAX_POINTS / 2) <= len(curve["x"]) <= curves.MAX_POINTS
    assert curve["x"][-1] == 1.0 and curve["x"] == sorted(curve["x"])


def test_text_from_the_log_is_escaped(tmp_path):
    windows = run_windows(make_log(caption=MALICIOUS), tmp_path)
    for name in ("photo 1", "settings"):
        content = windows[name]["data"][0]["content"]
        assert "<script" not in content and "<img src=x" not in content and "&lt;script&gt;" in content
    names = [curve["name"] for curve in comparison_windows({"<b>": make_log(), "b": make_log()})["loss"]["data"]]
    assert names == ["&lt;b&gt;: train", "&lt;b&gt;: validation", "b: train", "b: validation"]


def test_an_incomplete_last_line_of_the_log_is_ignored(tmp_path):
    write_log(tmp_path, make_log())
    complete = read_log(tmp_path)
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "ep')
    assert read_log(tmp_path) == complete


@pytest.mark.parametrize("content", [None, "no json\n"])
def test_a_folder_without_a_valid_log_is_refused_in_one_line(tmp_path, content):
    if content:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(UserError, match="log.jsonl") as error:
        dashboard_command.main(Dashboard(replay=tmp_path))
    assert "\n" not in str(error.value)


def test_the_dashboard_flag_has_an_optional_url():
    def dashboard_url(*flags):
        return parse(Train, ["data/x", "--run", "a", *flags]).dashboard

    assert dashboard_url() is None
    assert dashboard_url("--dashboard") == dashboard_url("--dashboard", "--epochs", "3") == DASHBOARD_URL
    assert dashboard_url("--dashboard", "http://host:1") == "http://host:1"
    with pytest.raises(UserError, match="host: is no URL"):
        VisdomClient("host", "x")


# ---- the scripts of the page


def fake_npm(folder, version=None):
    """An npm that packs the files of SOURCES without a network."""
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


def test_scripts_come_from_npm_if_the_cdn_does_not_answer_and_are_downloaded_once(tmp_path, monkeypatch):
    requests = []
    npm = fake_npm(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: requests.append(url) or no_network())
    monkeypatch.setattr(shutil, "which", lambda name: npm)
    visdom_server.fetch_page(tmp_path / "static")
    assert len(requests) == 1, "a CDN that does not answer is tried once"
    for source in visdom_server.SOURCES:
        for path, target in source.paths.items():
            assert (tmp_path / "static" / target).read_text() == f"{source.package} {path}"
    monkeypatch.setattr(subprocess, "run", no_network)
    visdom_server.fetch_page(tmp_path / "static")


def test_a_package_of_another_version_is_not_used(tmp_path, monkeypatch):
    npm = fake_npm(tmp_path, version="9.9.9")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(shutil, "which", lambda name: npm)
    with pytest.raises(UserError, match="brought 9.9.9"):
        visdom_server.fetch_page(tmp_path / "static")
    assert not (tmp_path / "static").exists()


def test_without_cdn_and_npm_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no network; npm is not installed.*once.*start again") as error:
        visdom_server.fetch_page(tmp_path / "static")
    assert "\n" not in str(error.value)


def test_without_visdom_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="visdom is not installed; run: make dashboard"):
        dashboard_command.main(Dashboard())


# ---- a real server


class Server:
    """visdom in a process of its own: a fork of this one, to save the seconds of importing torch."""

    def __init__(self, port, folder, host="127.0.0.1", user=None):
        self.folder = folder
        self.user = user
        self.url = f"http://127.0.0.1:{port}"
        reading, writing = os.pipe()
        self.process = multiprocessing.get_context("fork").Process(target=self.serve, args=(host, port, writing))
        self.process.start()
        os.close(writing)
        self.stdout = open(reading, encoding="utf-8")
        self.output = ""
        while "press Ctrl-C to stop" not in self.output:
            line = self.stdout.readline()
            assert line, "the server ended"
            self.output += line

    def serve(self, host, port, stdout):
        os.environ["HOME"] = str(self.folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with open(stdout, "w", encoding="utf-8") as sys.stdout:
            visdom_server.serve(host, port, self.folder, self.user)

    def windows(self, environment):
        message = json.dumps({"win": None, "eid": environment}).encode()
        with urllib.request.urlopen(f"{self.url}/win_data", message, timeout=10) as answer:
            return json.loads(answer.read())

    def kill(self):
        self.process.kill()
        self.process.join()
        self.stdout.close()


@pytest.fixture(scope="module")
def visdom_installed():
    if importlib.util.find_spec("visdom") is None:
        pytest.skip("visdom is not installed: the extra named dashboard")
    importlib.import_module("visdom.server.app")  # for all servers, which are forks of this process


@pytest.fixture(scope="module")
def server(visdom_installed, tmp_path_factory):
    """One server for all tests that do not stop it."""
    server = Server(free_port(), tmp_path_factory.mktemp("visdom"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard")
    make_small_data(folder)
    before = os.getcwd()
    os.chdir(folder)
    extract_features.main(ExtractFeatures(Path("data/small"), "resnet18.layer2", "random", 64, workers=0))
    yield folder
    os.chdir(before)


def test_the_server_returns_all_windows_of_a_replayed_run(server, tmp_path, capsys):
    write_log(tmp_path / "checkpoints" / "att", make_log())
    run = tmp_path / "checkpoints" / "att"
    dashboard_command.main(Dashboard(replay=run, url=server.url))
    assert capsys.readouterr().out == f"{page_url(server.url, environment_of(run))}\n"
    returned = server.windows(environment_of(run))
    assert str(run) in returned["settings"]["content"]
    for name, window in run_windows(make_log(), run).items():
        if returned[name]["type"] == "text":
            assert returned[name]["content"] == window["data"][0]["content"]
        else:
            assert returned[name]["content"] == {"data": window["data"], "layout": window["layout"]}
    assert CAPTION in returned["photo 1"]["content"]
    assert (server.folder / f"{environment_of(run)}.json").exists(), "the environment is saved"


def test_runs_of_one_name_have_pages_and_curves_of_their_own(server, tmp_path):
    runs = tmp_path / "one/checkpoints/att", tmp_path / "two/checkpoints/att"
    for run, epochs in zip(runs, (1, 2), strict=True):
        write_log(run, make_log(epochs=epochs))
        dashboard_command.main(Dashboard(replay=run, url=server.url))
    dashboard_command.main(Dashboard(compare=runs, url=server.url))
    assert [server.windows(environment_of(run))["loss"]["content"]["data"][1]["x"] for run in runs] == [[1], [1, 2]]
    names = [curve["name"] for curve in server.windows(environment_of(*runs))["loss"]["content"]["data"]]
    kinds = ("train", "validation")
    assert names == [f"{folder}/checkpoints/att: {kind}" for folder in ("one", "two") for kind in kinds]


def test_the_page_of_a_comparison_is_never_that_of_a_run(server, tmp_path):
    write_log(tmp_path / "a and b", make_log(epochs=3))
    for name in ("a", "b"):
        write_log(tmp_path / name, make_log())
    dashboard_command.main(Dashboard(replay=tmp_path / "a and b", url=server.url))
    dashboard_command.main(Dashboard(compare=(tmp_path / "a", tmp_path / "b"), url=server.url))
    assert len(server.windows(environment_of(tmp_path / "a and b"))["loss"]["content"]["data"]) == 2
    assert len(server.windows(environment_of(tmp_path / "a", tmp_path / "b"))["loss"]["content"]["data"]) == 4


def test_a_run_is_named_by_as_many_folders_as_tell_it_from_the_others():
    assert run_names([Path("x/att"), Path("x/lstm")]) == ["att", "lstm"]
    assert run_names([Path("x/att"), Path("y/att"), Path("y/lstm")]) == ["x/att", "y/att", "y/lstm"]
    with pytest.raises(UserError, match="x/att x/../x/att: has a run twice"):
        run_names([Path("x/att"), Path("x/../x/att")])


def test_an_environment_may_have_any_name_and_its_address_is_encoded(tmp_path):
    environment = environment_of(tmp_path / "50% 狗?#+")
    assert re.fullmatch(r"50% 狗\?#\+-[0-9a-f]{8}", environment)
    assert re.fullmatch(r"http://h/env/50%25%20%E7%8B%97%3F%23%2B-\w{8}", page_url("http://h", environment))
    assert len(environment_of(*(tmp_path / f"{'狗' * 40}{i}" for i in range(9))).encode()) < 200, "the name of a file"


def test_a_server_with_a_login_shows_runs_to_its_user_alone(visdom_installed, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VISDOM_PASSWORD", "secret")
    write_log(tmp_path / "att", make_log())
    server = Server(free_port(), tmp_path / "visdom", host="0.0.0.0", user="me")
    try:
        assert "WARNING" not in server.output
        dashboard_command.main(Dashboard(replay=tmp_path / "att", url=server.url, user="me"))
        saved = tmp_path / "visdom" / f"{environment_of(tmp_path / 'att')}.json"
        assert CAPTION in json.dumps(json.loads(saved.read_text("utf-8")), ensure_ascii=False)
        with pytest.raises(UserError, match=f"--url {server.url}: asks for a login; give its user, and the password"):
            dashboard_command.main(Dashboard(replay=tmp_path / "att", url=server.url))
        client = VisdomClient(server.url.replace("//", "//me@"), "live")
        assert client.url == server.url
        client.send({"loss": run_windows(make_log(), tmp_path)["loss"]})
        assert (tmp_path / "visdom" / "live.json").exists()
        monkeypatch.setenv("VISDOM_PASSWORD", "wrong")
        with VisdomTailer(tmp_path / "att", server.url.replace("//", "//me@")):
            pass
        assert "refuses the user me with the password in VISDOM_PASSWORD; training" in capsys.readouterr().out
    finally:
        server.kill()
    assert (tmp_path / "visdom" / "COOKIE_SECRET").stat().st_mode & 0o77 == 0
    monkeypatch.delenv("VISDOM_PASSWORD")
    with pytest.raises(UserError, match="--user me: set the environment variable VISDOM_PASSWORD"):
        VisdomClient(server.url, "x", "me")
    with pytest.raises(UserError, match="put the password in VISDOM_PASSWORD"):
        Train(Path("data"), "a", dashboard="http://me:secret@host:8097")


def test_a_server_that_restarts_between_two_updates_gets_all_windows_again(monkeypatch):
    client = VisdomClient("http://127.0.0.1:8097", "att")
    held, posted = set(), []

    def post(path, message):
        if path == "win_exists":
            return "true" if message["win"] in held else "false"
        if path == "events":
            held.add(message["win"])
            posted.append(message["win"])
        return ""

    monkeypatch.setattr(client, "_post", post)
    for _ in range(2):
        client.send({"loss": {}, "settings": {}})
    assert posted == ["loss", "settings"], "windows that have not changed are not sent again"
    held.clear()
    client.send({"loss": {}, "settings": {}})
    assert posted == 2 * ["loss", "settings"]


def test_a_server_that_restarts_during_a_run_shows_the_whole_run_again(
    visdom_installed, small_data, tmp_path, monkeypatch, capsys
):
    """Training is not affected: the losses equal those of a run without a dashboard."""
    monkeypatch.setattr(log_tailer, "POLL_INTERVAL", 0.05)
    setting = {**TINY, "epochs": 4, "preview_photos": 1, "max_length": 12}
    port = free_port()
    servers = [Server(port, tmp_path / "visdom")]
    validations = 0
    validate = train.Trainer.validate

    def validate_and_restart_server(self, stop):
        nonlocal validations
        validations += 1
        if validations == 2:
            wait_for(lambda: servers[0].windows(environment_of(Path("checkpoints/watched")))["loss"])
            servers[0].kill()
        if validations == 3:
            time.sleep(0.5)  # the thread notices the dead server
            servers.append(Server(port, tmp_path / "another"))
        return validate(self, stop)

    monkeypatch.setattr(train.Trainer, "validate", validate_and_restart_server)
    try:
        train.main(Train(Path("data/small"), "watched", dashboard=servers[0].url, **setting))
        returned = servers[1].windows(environment_of(Path("checkpoints/watched")))
    finally:
        for server in servers:
            server.kill()
    monkeypatch.setattr(train.Trainer, "validate", validate)
    output = capsys.readouterr().out
    assert output.count("does not answer") == output.count("answers again") == 1
    assert returned["loss"]["content"]["data"][1]["x"] == [1, 2, 3, 4]
    assert "data:image/png;base64," in returned["photo 1"]["content"]
    assert "a white square" in returned["photo 1"]["content"]
    train.main(Train(Path("data/small"), "alone", **setting))
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
    raise AssertionError(f"the condition is not met after {seconds} seconds")


def test_a_server_that_never_answers_does_not_delay_training(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboard, "TIMEOUT", 1.0)
    write_log(tmp_path / "run", make_log())
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        start = time.monotonic()
        with VisdomTailer(tmp_path / "run", f"http://127.0.0.1:{silent_server.getsockname()[1]}"):
            started = time.monotonic() - start
            time.sleep(0.3)
        assert started < 1.0 and time.monotonic() - start < 20
    assert threading.active_count() < 20


def test_listening_on_another_host_prints_a_warning(visdom_installed, tmp_path):
    server = Server(free_port(), tmp_path, host="0.0.0.0")
    server.kill()
    assert "WARNING" in server.output and "without a password" in server.output


def test_by_default_the_server_listens_on_this_machine_only(server):
    assert Dashboard().host == "127.0.0.1" and "WARNING" not in server.output
    if Path("/proc/net/tcp").exists():  # the open sockets, address:port in hexadecimal
        port = f":{int(server.url.rpartition(':')[2]):04X}"
        lines = [line.split() for net in ("tcp", "tcp6") for line in open(f"/proc/net/{net}", encoding="utf-8")]
        assert {line[1] for line in lines if line[1].endswith(port) and line[3] == "0A"} == {"0100007F" + port}


# ---- the page, in a browser


@pytest.fixture
def browser():
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("chromium and chromedriver are not installed: apt install chromium chromium-driver")
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("selenium is not installed: the extra named test")
    static = visdom_server.static_folder()
    targets = [target for source in visdom_server.SOURCES for target in source.paths.values()]
    if not all((static / target).exists() for target in targets):
        pytest.skip("the scripts of visdom's page are not downloaded: run make dashboard")
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


def test_the_page_shows_curves_captions_and_attention_offline(server, browser, tmp_path):
    from selenium.common.exceptions import NoAlertPresentException

    words, run = ["一个", "男人", "骑马"], tmp_path / "att"
    attention = np.eye(196, dtype=np.float32)[[20, 80, 150]]
    item = CaptionedImage(Image.new("RGB", (90, 60), "green"), CAPTION, words, attention, (14, 14))
    draw_card(item, run / "pictures/1.png")
    write_log(run, make_log(caption=CAPTION + MALICIOUS, picture="pictures/1.png"))
    dashboard_command.main(Dashboard(replay=run, url=server.url))
    browser.get(page_url(server.url, environment_of(run)))
    evaluate = browser.execute_script
    wait_for(lambda: evaluate("return document.querySelectorAll('.window .scatterlayer .trace').length") >= 2)
    wait_for(lambda: CAPTION in evaluate("return document.body.innerText"))
    wait_for(
        lambda: evaluate(
            "return [...document.images].some(i => i.src.startsWith('data:image/png') && i.naturalWidth > 900)"
        )
    )
    assert MALICIOUS in evaluate("return document.body.innerText"), "shown as text, not run"
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert.accept()
    assert browser.save_screenshot(str(tmp_path / "page.png")) and Image.open(tmp_path / "page.png").width > 1000
    missing = [entry for entry in browser.get_log("browser") if re.search(r"static/.*\b(404|Failed)", entry["message"])]
    assert not missing
