"""python -m captioning.serve checkpoints/RUN: every client gets its caption, or one line that says why not."""

import asyncio
import contextlib
import io
import json
import signal
import subprocess
import sys
import threading

import pytest
from PIL import Image

from bench import web as bench
from captioning import serve
from captioning.caption import CaptionResult
from captioning.captioner import Captioner
from captioning.encoders.images import Transform
from captioning.search.options import SearchOptions
from captioning.web.service import MAX_PHOTOS, Limits, Service, answer, caption_handler
from captioning.web.site import PAGE
from tests.test_export import write_tiny_run

pytest.importorskip("tornado", reason="tornado is not installed: the extra named serve")
from tornado.simple_httpclient import SimpleAsyncHTTPClient  # noqa: E402
from tornado.web import Application  # noqa: E402

TRANSFORM = Transform(8)
LIMITS = Limits(batch_size=8, requests=60, bytes=20_000, pixels=10_000)


def png(red=0, green=0, size=(8, 8)):
    """A photo of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, (red, green, 0)).save(file, "png")
    return file.getvalue()


class ColourCaptioner:
    """Captions a photo with its red and green, while `may_work` is set; notes the size of each batch."""

    def __init__(self):
        self.batches = []
        self.may_work = threading.Event()
        self.may_work.set()

    def __call__(self, photos):
        assert self.may_work.wait(20)
        self.batches.append(len(photos))
        return [CaptionResult(f"{photo[0, 0, 0]} {photo[1, 0, 0]}", ["a"], -1.0, True) for photo in photos]


class Client:
    """Posts to a service."""

    def __init__(self, port):
        self.port = port
        self.http = SimpleAsyncHTTPClient(force_instance=True, max_clients=100)

    async def post(self, body, path="caption", **headers):
        """-> status, content from JSON, headers."""
        url = f"http://127.0.0.1:{self.port}/{path}"
        response = await self.http.fetch(url, method="POST", body=body, headers=headers, raise_error=False)
        assert response.headers["Content-Type"] == "application/json; charset=utf-8"
        assert response.body.count(b"\n") == 1
        return response.code, json.loads(response.body), response.headers

    async def get(self, path):
        return await self.http.fetch(f"http://127.0.0.1:{self.port}/{path}", raise_error=False)


def with_service(service, work, application=None):
    """Run work(client) while the service is served, on a free port of this machine."""

    async def both():
        port = bench.free_port()
        handlers = application or Application([("/caption", caption_handler(service))])
        server = asyncio.create_task(serve.listen(handlers, "127.0.0.1", port, "test", service))
        await asyncio.sleep(0)  # it listens
        try:
            await asyncio.wait_for(work(Client(port)), 300)
            assert service.open == 0
        finally:
            server.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await server

    asyncio.run(both())


async def until(condition):
    """Wait for a condition."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


@pytest.fixture
def captioner():
    return ColourCaptioner()


@pytest.fixture
def service(captioner):
    return Service(captioner, TRANSFORM, LIMITS)


def test_of_fifty_clients_none_loses_a_request_and_those_that_meet_share_batches(service, captioner, times, tally):
    requests = times(150, 1000)
    numbers = iter(range(requests))
    answers = {}

    async def client(http):
        for number in numbers:  # which all clients share
            status, content, _ = await http.post(png(*divmod(number, 256)))
            assert status == 200
            answers[number] = content["caption"]

    async def work(http):
        await asyncio.gather(*(client(http) for _ in range(50)))

    with_service(service, work)
    assert answers == {number: "{} {}".format(*divmod(number, 256)) for number in range(requests)}
    assert sum(captioner.batches) == requests
    assert max(captioner.batches) == LIMITS.batch_size and len(captioner.batches) < requests / 2
    tally("requests to the service", requests)


def form(*photos):
    """A form with these files -> its body and its Content-Type."""
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="photo"; filename="%d.png"\r\n\r\n%s\r\n' % (number, photo)
        for number, photo in enumerate(photos)
    ]
    return b"".join([*parts, b"--x--\r\n"]), {"Content-Type": "multipart/form-data; boundary=x"}


def test_a_bad_upload_is_refused_with_one_line_and_the_service_goes_on(service, captioner):
    cases = [
        (400, "the photo: empty; send the bytes", b"", {}),
        (400, "the photo: not an image", b"a text", {}),
        (400, "the photo: ", png(size=(90, 90))[:50], {}),
        (413, "the photo: 200 x 51: send a photo of at most 10,000 pixels", png(size=(200, 51)), {}),
        (413, "the request is too large: send at most 20,000 bytes", bytes(20_001), {}),
        (400, "1.png: not an image", *form(png(), b"a text")),
        (413, f"{MAX_PHOTOS + 1} photos in one request", *form(*[b"."] * (MAX_PHOTOS + 1))),
        (400, "the form has no files", *form()),
        (400, "the form ", b"nothing", {"Content-Type": "multipart/form-data"}),
    ]

    async def work(http):
        for status, text, body, headers in cases:
            found, content, _ = await http.post(body, **headers)
            assert (found, list(content)) == (status, ["error"]), text
            assert content["error"].startswith(text)
        response = await http.get("caption")
        assert (response.code, json.loads(response.body)) == (
            405,
            {"error": "Method Not Allowed: POST a photo to /caption"},
        )
        assert captioner.batches == []
        assert (await http.post(png(7)))[:2] == (200, answer(CaptionResult("7 0", ["a"], -1.0, True), False))

    with_service(service, work)


def test_a_full_service_says_when_to_try_again(captioner):
    service = Service(captioner, TRANSFORM, Limits(requests=2))
    captioner.may_work.clear()

    async def work(http):
        first = asyncio.gather(http.post(png(1)), http.post(png(2)))
        await until(lambda: service.open == 2)
        status, content, headers = await http.post(png(3))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert content == {"error": "2 requests are in work; try again in 1 s"}
        captioner.may_work.set()
        assert [content["caption"] for _, content, _ in await first] == ["1 0", "2 0"]
        assert (await http.post(png(3)))[0] == 200

    with_service(service, work)


def test_a_client_that_leaves_frees_its_place(service, captioner):
    async def leave(http, sent):
        _, writer = await asyncio.open_connection("127.0.0.1", http.port)
        writer.write(b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(png()) + png()[:sent])
        await until(lambda: service.open == 1)
        writer.close()

    async def work(http):
        await leave(http, 20)
        await until(lambda: service.open == 0)
        captioner.may_work.clear()
        await leave(http, len(png()))
        await asyncio.sleep(0.05)
        assert service.open == 1, "its photo is still in work"
        captioner.may_work.set()
        await until(lambda: service.open == 0)
        assert (await http.post(png()))[0] == 200

    with_service(service, work)


def test_a_stop_signal_lets_requests_in_work_finish(service, captioner):
    captioner.may_work.clear()

    async def work(http):
        (server,) = (task for task in asyncio.all_tasks() if task.get_coro().__name__ == "listen")
        in_work = asyncio.create_task(http.post(png(5)))
        await until(lambda: service.open == 1)
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: service.stopping)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", http.port)
        assert not in_work.done() and not server.done()
        captioner.may_work.set()
        status, content, headers = await in_work
        assert (status, content["caption"], headers["Connection"]) == (200, "5 0", "close")
        await asyncio.wait_for(server, 10)

    with_service(service, work)


def test_a_batch_that_fails_ends_its_requests_alone(service, captioner, capsys):
    service.batches.caption_photos = lambda photos: 1 / 0

    async def work(http):
        assert (await http.post(png()))[:2] == (500, {"error": "captioning failed: division by zero"})
        service.batches.caption_photos = captioner
        assert (await http.post(png()))[0] == 200

    with_service(service, work)
    assert "WARNING: captioning failed: division by zero" in capsys.readouterr().out


def test_a_calibrated_run_says_how_probable_a_caption_is():
    result = CaptionResult("a dog", ["a", "dog"], -1.5, True, probability=0.25, evidence=[0.0, 2.0])
    expected = {"caption": "a dog", "words": ["a", "dog"], "log_probability": -1.5, "finished": True}
    expected |= {"probability": 0.25, "evidence": [0.0, 2.0], "alternatives": []}
    assert answer(result, attention=True) == expected


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "config.json"])
def test_every_form_of_a_run_is_served_as_one(name, tmp_path):
    (tmp_path / "index.html").touch()
    assert not serve.is_run(tmp_path)
    (tmp_path / name).touch()
    assert serve.is_run(tmp_path)


def test_showing_a_site_loads_no_torch():
    code = """
import sys
from pathlib import Path
from captioning import serve
serve.is_run(Path("."))
serve.site_application(Path("."))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    """An untrained run with a tiny encoder."""
    return write_tiny_run(tmp_path_factory.mktemp("runs") / "att", small_data, "adaptive", scale=5)


def test_the_page_shows_what_the_server_finds(run, small_data, tmp_path, times):
    if times(True, False):
        pytest.skip("long form: make torture")
    if problem := bench.missing():
        pytest.skip(problem)
    captioner = Captioner.load(run, "cpu", "float32")
    search = SearchOptions(num_captions=5, min_length=3, max_length=6)
    service = Service.of(captioner, search, Limits(requests=2))  # the page must wait and try again
    photos = sorted((small_data / "photos").iterdir())[:8]
    (tmp_path / "text.jpg").write_text("not a photo")
    expected = [[one.text, *(other.text for other in one.others)] for one in captioner.caption(photos, search)]

    def look(url):
        with bench.browser() as driver:
            page = bench.Page(driver, url)
            page.add([*photos, tmp_path / "text.jpg"])
            assert [page.captions(number) for number in range(8)] == expected
            assert page.captions(8) == ["text.jpg could not be captioned (the photo: not an image)."]
            page.show(0)
            page.point_at(0)
            assert "on the server: cpu" in page.text("about")
            assert page.text("privacy") == "Photos are sent to the server of this page, which keeps none."
            assert all(address.startswith((url, "blob:", "data:")) for _, address in page.requests())
            assert not [message for message in page.log() if " 400 " not in message and " 503 " not in message]

    async def work(http):
        await asyncio.to_thread(look, f"http://127.0.0.1:{http.port}/")

    with_service(service, work, serve.run_application(service, captioner, run))


def test_a_run_answers_with_its_captions_and_serves_the_page(run, small_data):
    captioner = Captioner.load(run, "cpu", "float32")
    search = SearchOptions(num_captions=5, min_length=3, max_length=6)
    service = Service.of(captioner, search, Limits())
    service.warm_up()
    photos = [path.read_bytes() for path in sorted((small_data / "photos").iterdir())[:3]]
    expected = captioner.caption(photos, search)
    assert len({result.text for result in expected}) > 1, [result.text for result in expected]

    async def work(http):
        status, content, _ = await http.post(photos[0], "caption?attention=1")
        assert status == 200
        assert content["caption"] == expected[0].text and content["words"] == expected[0].words
        assert len(content["attention"]) == len(content["words"]) >= 3
        assert content["log_probability"] == pytest.approx(expected[0].log_probability, abs=1e-4)
        assert [other["caption"] for other in content["alternatives"]] == [other.text for other in expected[0].others]
        for of_word, sentinel in zip(content["attention"], content["sentinel"], strict=True):
            assert len(of_word) == 14 * 14 and sum(of_word) + sentinel == pytest.approx(1, abs=3e-3)
        body, headers = form(*photos)
        status, content, _ = await http.post(body, **headers)
        assert [(photo["name"], photo["caption"]) for photo in content["photos"]] == [
            (f"{number}.png", result.text) for number, result in enumerate(expected)
        ]
        assert "attention" not in content["photos"][0]
        page = await http.get("")
        assert page.body == (PAGE / "index.html").read_bytes()
        assert page.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        description = json.loads((await http.get("model/description.json")).body)
        assert (description["service"], description["run"], description["has_sentinel"]) == ("cpu", "att", True)

    with_service(service, work, serve.run_application(service, captioner, run))
