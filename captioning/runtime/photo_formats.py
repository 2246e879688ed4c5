"""The formats of photos, told by content: a photo may have any ending, or none."""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from captioning.errors import PhotoError

FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]  # no others: Pillow would run EPS in Ghostscript
with contextlib.suppress(ImportError):  # Pillow before 11.3
    import PIL.AvifImagePlugin  # noqa: F401

    FORMATS.append("AVIF")
AVIF_BRANDS = (b"avif", b"avis")  # ISO/IEC 23000-12: bytes 8 to 11 of a file whose bytes 4 to 7 are "ftyp"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
JPEG_PIXELS = 3  # times Pillow's limit: a JPEG is decoded at a half or less of its size, and of its memory


class PhotoBytes(io.BytesIO):
    """A photo file in memory. str() is the name by which messages call it."""

    def __init__(self, data: bytes | bytearray | memoryview, name: str):
        super().__init__(data)
        self.name = name

    def __str__(self) -> str:
        return self.name


PhotoFile = Path | str | PhotoBytes


def open_header(path: PhotoFile) -> Image.Image:
    """Open a photo file and read its header.

    A JPEG may have three times the pixels that Pillow allows, 268 million: it must be decoded at a reduced size.

    Raises PhotoError for a file that is no photo, has too many pixels, or needs a package that is not installed;
    OSError if it cannot be read; and whatever else Pillow raises for broken files.
    """
    if isinstance(path, PhotoBytes):
        path.seek(0)
    elif not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):  # opening a pipe would wait for ever
        raise PhotoError(f"{path}: not a file")
    with without_warnings():
        try:
            image = Image.open(path, formats=FORMATS)
        except UnidentifiedImageError:
            return _open_heif(path)
        except Image.DecompressionBombError:
            return _open_large_jpeg(path)
    if image.width * image.height <= (Image.MAX_IMAGE_PIXELS or math.inf):
        return image
    with image:  # up to twice the limit Pillow only warns
        return _open_large_jpeg(path)


@contextlib.contextmanager
def _ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


class _SharedByThreads:
    """Enters `_ignored` with the first thread and leaves it with the last one.

    `catch_warnings` replaces the filters of the whole process. If threads left it in another order than they entered,
    the filters of one of them would stay for ever.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = 0
        self.entered = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.threads:
                self.entered.enter_context(_ignored())
            self.threads += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.threads -= 1
            if not self.threads:
                self.entered.close()


_shared = _SharedByThreads()


def without_warnings() -> contextlib.AbstractContextManager[None]:
    """Keep Pillow from warning of damaged EXIF data, which does not affect the pixels, and of many pixels."""
    each_thread_has_filters = getattr(sys.flags, "context_aware_warnings", False)  # from Python 3.14 on
    return _ignored() if each_thread_has_filters else _shared


def is_photo(path: Path | str) -> bool:
    """Whether a file's content is that of a photo, though it may be damaged further on, or need another package."""
    try:
        open_header(path).close()
    except PhotoError as error:
        return not isinstance(error, NotAPhotoError)
    except Exception:  # PIL's readers raise many kinds of exceptions for broken files
        return False
    return True


class NotAPhotoError(PhotoError):
    """A file is of none of the formats."""


def _open_heif(path: PhotoFile) -> Image.Image:
    head = _read_head(path)
    if head[4:8] != b"ftyp" or head[8:] not in AVIF_BRANDS + HEIF_BRANDS:
        raise NotAPhotoError(f"{path}: not an image")
    if head[8:] in AVIF_BRANDS:
        raise PhotoError(f"{path}: an AVIF, which this Pillow does not read; pip install --upgrade pillow")
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise PhotoError(f"{path}: a HEIC, which needs pillow-heif; pip install 'kantu[heic]'") from None
    register_heif_opener()
    return Image.open(path, formats=["HEIF"])


def _read_head(path: PhotoFile) -> bytes:
    """The first 12 bytes."""
    if isinstance(path, PhotoBytes):
        return bytes(path.getbuffer()[:12])
    with open(path, "rb") as file:
        return file.read(12)


def _open_large_jpeg(path: PhotoFile) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS or 0  # None never comes here
    if isinstance(path, PhotoBytes):
        path.seek(0)  # the header has been read
    try:
        image = JpegImageFile(path)  # without the check of Image.open
    except SyntaxError:
        raise PhotoError(f"{path}: more than {limit:,} pixels") from None
    if image.width * image.height > JPEG_PIXELS * limit:
        image.close()
        raise PhotoError(f"{path}: more than {JPEG_PIXELS * limit:,} pixels")
    return image
