"""A captioner that answers requests: photos of requests that arrive together are captioned as one batch.

While a batch is computed, the photos that arrive wait; all of them, up to a limit, are the next batch. So nothing waits
for a timer, and the busier the service, the larger the batches. Photos are decoded in threads, before they wait.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from captioning.caption import CaptionResult
from captioning.captioner import Captioner
from captioning.encoders.images import Transform, open_image, stack_photos
from captioning.errors import PhotoError
from captioning.runtime.library_errors import reason
from captioning.runtime.photo_formats import PhotoBytes
from captioning.search.options import SearchOptions

if TYPE_CHECKING:
    from tornado.web import RequestHandler

MAX_PHOTOS = 64  # in a request: of tiny files, many more would fit into its bytes than into memory when decoded
POLL_SECONDS = 0.05
DIGITS = 5  # after the point, of probabilities and their logarithms
RETRY_SECONDS = 1  # after which a client that was refused may try again

CaptionPhotos = Callable[[Tensor], Sequence[CaptionResult]]  # (B, 3, S, S) uint8 -> a result of each photo


@dataclass(frozen=True)
class Limits:
    """What a service accepts."""

    batch_size: int = 32  # photos captioned at once
    requests: int = 128  # in work, waiting or being received; further ones are refused
    bytes: int = 20_000_000  # of a request
    pixels: int = 50_000_000  # of a photo


class Refusal(Exception):
    """A request that is not answered with captions: the status of HTTP, and one line that says why."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Upload(NamedTuple):
    """A photo file of a request."""

    name: str  # for messages
    content: bytes


class Batches:
    """Captions photos one batch after another, in a thread of its own."""

    def __init__(self, caption: CaptionPhotos, image_size: int, batch_size: int):
        self.caption_photos = caption
        self.image_size = image_size
        self.batch_size = batch_size
        self.waiting: deque[tuple[Tensor, asyncio.Future[CaptionResult]]] = deque()
        self.thread = ThreadPoolExecutor(1, "captioner")
        self.task: asyncio.Task[None] | None = None  # works until nothing waits

    async def caption(self, photos: Sequence[Tensor]) -> list[CaptionResult]:
        """Caption photos (3, S, S) uint8, with those of other callers. Raises what the captioner raises."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in photos]
        self.waiting.extend(zip(photos, futures, strict=True))
        if self.task is None or self.task.done():
            self.task = loop.create_task(self._work())
        return await asyncio.gather(*futures)

    async def _work(self) -> None:
        while self.waiting:
            count = min(self.batch_size, len(self.waiting))
            photos, futures = zip(*(self.waiting.popleft() for _ in range(count)), strict=True)
            try:
                results = await asyncio.get_running_loop().run_in_executor(self.thread, self._caption_batch, photos)
            except Exception as error:  # such as no memory: it ends these requests, not the service
                for future in futures:
                    future.set_exception(error)
            else:
                for future, result in zip(futures, results, strict=True):
                    future.set_result(result)

    def _caption_batch(self, photos: Sequence[Tensor]) -> Sequence[CaptionResult]:
        return self.caption_photos(stack_photos(photos, self.image_size))


class Service:
    """The requests that a captioner works on."""

    def __init__(self, caption: CaptionPhotos, transform: Transform, limits: Limits):
        self.transform = transform
        self.limits = limits
        self.batches = Batches(caption, transform.image_size, limits.batch_size)
        self.readers = ThreadPoolExecutor(os.cpu_count() or 1, "reader")
        self.open = 0  # requests that were admitted and not yet answered
        self.stopping = False

    @classmethod
    def of(cls, captioner: Captioner, search: SearchOptions, limits: Limits) -> Service:
        """The service of a captioner. Loads the encoder."""
        transform = captioner.encoder.transform
        return cls(lambda photos: captioner.caption_resized(photos, search), transform, limits)

    def warm_up(self) -> None:
        """Caption a black photo, so that the first request does not wait for what happens once."""
        size = self.transform.image_size
        self.batches.caption_photos(torch.zeros(1, 3, size, size, dtype=torch.uint8))

    def admit(self) -> None:
        """Count a request in, until `release`. Raises Refusal if there is no room for it, or the service stops."""
        if self.stopping:
            raise Refusal(503, "the service is stopping")
        if self.open >= self.limits.requests:
            raise Refusal(503, f"{self.open} requests are in work; try again in {RETRY_SECONDS} s")
        self.open += 1

    def release(self) -> None:
        """Count an admitted request out."""
        self.open -= 1

    async def finish(self) -> None:
        """Refuse new requests, and return when those in work are answered."""
        self.stopping = True
        while self.open:
            await asyncio.sleep(POLL_SECONDS)

    async def caption(self, uploads: Sequence[Upload]) -> list[CaptionResult]:
        """Decode and caption photos. Raises Refusal for one that cannot be read, or too many."""
        if len(uploads) > MAX_PHOTOS:
            raise Refusal(413, f"{len(uploads)} photos in one request: send at most {MAX_PHOTOS}")
        loop = asyncio.get_running_loop()
        photos = await asyncio.gather(*(loop.run_in_executor(self.readers, self.read, upload) for upload in uploads))
        try:
            return await self.batches.caption(photos)
        except Exception as error:
            print(f"WARNING: captioning failed: {reason(error)}", flush=True)
            raise Refusal(500, f"captioning failed: {reason(error)}") from None

    def read(self, upload: Upload) -> Tensor:
        """Decode a photo -> (3, S, S) uint8. Raises Refusal."""
        if not upload.content:
            raise Refusal(400, f"{upload.name}: empty; send the bytes of a photo file")
        file = PhotoBytes(upload.content, upload.name)
        try:
            with open_image(file) as image:
                width, height = image.size
            if width * height > self.limits.pixels:
                limit = f"at most {self.limits.pixels:,} pixels"
                raise Refusal(413, f"{upload.name}: {width} x {height}: send a photo of {limit}")
            return self.transform.resize(self.transform.open(file))
        except PhotoError as error:
            raise Refusal(400, str(error)) from None


def to_record(result: CaptionResult, attention: bool) -> dict[str, Any]:
    """A caption as plain data. attention: also where each word looked, (T, P), its rows being those of the words."""
    record: dict[str, Any] = {
        "caption": result.text,
        "words": result.words,
        "log_probability": result.log_probability,
        "finished": result.finished,
        "probability": result.probability,
        "evidence": result.evidence,
    }
    if attention and result.attention is not None:
        record |= {"attention": result.attention.tolist(), "grid": list(result.grid), "sentinel": result.sentinel}
    return {name: _rounded(value) for name, value in record.items() if value is not None}


def _rounded(value: Any) -> Any:
    """Numbers, also in lists, with as many digits as mean something."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def answer(result: CaptionResult, attention: bool) -> dict[str, Any]:
    """The captions of a photo as plain data: the best one, and the others in it."""
    alternatives = [to_record(other, attention) for other in result.others]
    return {**to_record(result, attention), "alternatives": alternatives}


def is_form(content_type: str) -> bool:
    """Whether a request holds files of a form, rather than one photo as it is."""
    return content_type.lower().startswith("multipart/")


def uploads_of(content_type: str, body: bytes) -> list[Upload]:
    """The photos of a request: all files of a form, or the body. Raises Refusal if there is none."""
    from tornado.httputil import HTTPFile, HTTPInputError, parse_body_arguments

    if not is_form(content_type):
        return [Upload("the photo", body)]
    files: dict[str, list[HTTPFile]] = {}
    try:
        parse_body_arguments(content_type, body, {}, files)
    except HTTPInputError as error:
        raise Refusal(400, f"the form cannot be read: {reason(error)}") from None
    uploads = [Upload(file.filename, file.body) for of_field in files.values() for file in of_field]
    if not uploads:
        raise Refusal(400, "the form has no files; send photos with curl -F photo=@photo.jpg, or one as the body")
    return uploads


def caption_handler(service: Service) -> type[RequestHandler]:
    """The tornado handler of POST /caption."""
    from tornado.web import RequestHandler, stream_request_body

    @stream_request_body
    class CaptionHandler(RequestHandler):
        """Reads the body to its end even if it refuses it: a client that is still sending would not read the reason."""

        def prepare(self) -> None:
            self.content: list[bytes] = []
            self.received = 0
            self.admitted = self.working = False
            self.refusal: Refusal | None = None
            if self.request.method != "POST":
                return
            try:
                service.admit()
                self.admitted = True
            except Refusal as refusal:
                self.refusal = refusal

        def data_received(self, chunk: bytes) -> None:
            self.received += len(chunk)
            if self.received > service.limits.bytes:
                limit = f"at most {service.limits.bytes:,} bytes"
                self.refusal = self.refusal or Refusal(413, f"the request is too large: send {limit}")
            if self.refusal:
                self.content.clear()
            else:
                self.content.append(chunk)

        async def post(self) -> None:
            self.working = True
            try:
                await self._answer()
            finally:
                self._release()

        async def _answer(self) -> None:
            content_type = self.request.headers.get("Content-Type", "")
            try:
                if self.refusal:
                    raise self.refusal
                uploads = uploads_of(content_type, b"".join(self.content))
                attention = self.get_query_argument("attention", "0") not in ("0", "")
                answers = [answer(result, attention) for result in await service.caption(uploads)]
            except Refusal as refusal:
                await self._write(refusal.status, {"error": str(refusal)})
                return
            if is_form(content_type):
                named = [{"name": upload.name, **one} for upload, one in zip(uploads, answers, strict=True)]
                await self._write(200, {"photos": named})
            else:
                await self._write(200, answers[0])

        async def _write(self, status: int, content: dict[str, Any]) -> None:
            """Answer, and wait until the answer is sent."""
            self.set_status(status)
            self.set_header("Content-Type", "application/json; charset=utf-8")
            self.set_header("X-Content-Type-Options", "nosniff")
            if status == 503:
                self.set_header("Retry-After", str(RETRY_SECONDS))
            if service.stopping:
                self.set_header("Connection", "close")
            await self.finish(json.dumps(content, ensure_ascii=False) + "\n")

        def write_error(self, status_code: int, **_: Any) -> None:
            """What tornado refuses, such as another method, as JSON too."""
            remedy = f": POST a photo to {self.request.path}" if status_code == 405 else ""
            self.set_header("Content-Type", "application/json; charset=utf-8")
            self.finish(json.dumps({"error": f"{self._reason}{remedy}"}) + "\n")

        def on_connection_close(self) -> None:
            super().on_connection_close()
            if not self.working:  # the client left before it had sent all
                self._release()

        def on_finish(self) -> None:
            if not self.working:
                self._release()

        def _release(self) -> None:
            if self.admitted:
                self.admitted = False
                service.release()

    return CaptionHandler
