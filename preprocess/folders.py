"""Names of photos, of hidden files and of splits, and a walk through a user's folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

PHOTO_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
CAPTION_ENDINGS = (".txt", ".json")  # of files beside a photo
SPLITS = ("train", "val", "test")
# restval: the photos of COCO's val2014 that are in neither Karpathy's val nor test; most published work trains on it
SPLIT_NAMES = {name: name for name in SPLITS} | {"restval": "train", "validation": "val", "valid": "val", "dev": "val"}
# train, train2017, val-0001, captions_test, Flickr_8k.devImages, flickr8ktrain; but not "contest" or "training_notes"
SPLIT_IN_NAME = re.compile(
    r"(?:^|[^a-z]|(?<=\dk))(train|validation|valid|val|dev|test)(?:images)?(?:[^a-z].*)?$", re.IGNORECASE
)


def has_photo_ending(name: str) -> bool:
    """Whether a name ends like that of a photo."""
    return name.lower().endswith(PHOTO_ENDINGS)


def photo_stem(name: str) -> str:
    """The name without the ending of a photo."""
    return name.rpartition(".")[0] if has_photo_ending(name) else name


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none that the user put there: ._x.jpg, .cache, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def split_in_name(name: str) -> str | None:
    """The split that the name of a file or folder says."""
    match = SPLIT_IN_NAME.search(photo_stem(name))
    return SPLIT_NAMES[match[1].lower()] if match else None


def split_in_folders(path: str) -> str | None:
    """The split that the folders of a path, which are separated by /, say: the first that says one."""
    return next(filter(None, map(split_in_name, path.split("/")[:-1])), None)


def walk(root: str, hidden: list[str] | None = None) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in alphabetical order, which follows links and enters no folder twice.

    Hidden files and folders are passed over, and appended to `hidden`.
    """
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if hidden is not None:
            hidden += [os.path.join(folder, name) for name in (*folders, *files) if is_hidden(name)]
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield folder, folders, sorted(name for name in files if not is_hidden(name))
