"""What --source names: an annotation file, the folder of a data set, or tars; and where its photos are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from captioning.errors import UserError
from preprocess.annotations import Annotations, Record, collect, find_reader
from preprocess.columns import Columns
from preprocess.content import Content, Folder, load_content
from preprocess.folders import PHOTO_ENDINGS, has_photo_ending, split_in_folders, split_in_name, walk
from preprocess.splits import apply_split_lists
from preprocess.unpack import is_tar, unpack_tars

ANNOTATION_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".token", ".parquet")
MAX_DEPTH = 3  # of folders below the source in which annotations and photos are looked for
MAX_FOLDERS = 10_000  # looked at for photos
SAMPLE = 20  # photos whose files decide on the image folder


@dataclass(frozen=True, slots=True)
class Source:
    """One annotation file, parsed, and the split that its name says."""

    content: Content
    split: str | None = None


def read_source(path: Path, images: Path | None, unpacked: Path, columns: Columns) -> tuple[Annotations, list[Path]]:
    """The annotations of a source, and the image folders that its records lie in.

    images: the image folder; None: it is looked for, and printed. unpacked: where photos inside files are written.
    Raises UserError where nothing of a known form is found, or several files and it is unclear which to take.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    found, folders = Annotations(), []
    for source in _find_sources(path, unpacked, columns):
        annotations = collect(source.content, find_reader(source.content))
        if source.split:
            annotations.records = [
                record if record.split else replace(record, split=source.split) for record in annotations.records
            ]
        annotations = apply_split_lists(source.content.path, annotations)
        folder = images or _find_images(path, source.content.path, unpacked, annotations.records)
        found.records += [replace(record, image=os.path.join(folder, record.image)) for record in annotations.records]
        found.left_out += annotations.left_out
        folders.append(folder)
    return found, folders


def _find_sources(path: Path, unpacked: Path, columns: Columns) -> list[Source]:
    if is_tar(path):
        return _unpack(path.parent, [path], unpacked, columns)
    if path.is_dir() and (tars := _find_tars(path, depth=0)):
        return _unpack(path, tars, unpacked, columns)
    content = load_content(path, columns, unpacked)
    if not isinstance(content.data, Folder) or _is_known(content):
        return [Source(content)]
    hidden = len(content.data.hidden)
    if hidden:
        print(f"{path}: {hidden:,} hidden files and folders passed over, such as {content.data.hidden[0]}")
    sources = list(_sources_below(content, unpacked))
    if not sources and (tars := _find_tars(path, MAX_DEPTH)):
        return _unpack(path, tars, unpacked, columns)
    if not sources:
        find_reader(content)  # raises: it says what the folder holds
    if len(sources) > 1 and not all(source.split for source in sources):
        names = ", ".join(os.path.relpath(source.content.path, path) for source in sources[:6])
        raise UserError(f"{path}: {len(sources)} files hold captions ({names}); give one of them to --source")
    return sources


def _find_tars(root: Path, depth: int) -> list[Path]:
    """The tars in a folder and in those at most `depth` below it, in alphabetical order."""
    return [file for folder, names in _walk_to(root, depth) for name in names if is_tar(file := folder / name)]


def _walk_to(root: Path, depth: int) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those at most `depth` below it, in alphabetical order, each with the names of its files."""
    for folder, folders, files in walk(str(root)):
        yield Path(folder), files
        if len(Path(folder).relative_to(root).parts) >= depth:
            folders.clear()


def _unpack(root: Path, tars: list[Path], unpacked: Path, columns: Columns) -> list[Source]:
    return [Source(load_content(unpack_tars(root, tars, unpacked), columns))]


def _sources_below(folder: Content, unpacked: Path) -> Iterator[Source]:
    """The annotation files in a folder, each with the split that its name, or else its folder's, says."""
    assert isinstance(folder.data, Folder)
    for name in folder.data.files:
        if name.count("/") >= MAX_DEPTH or not name.lower().endswith(ANNOTATION_ENDINGS):
            continue
        try:
            content = load_content(folder.path / name, folder.columns, unpacked)
        except UserError as error:
            print(f"passed over: {error}")
            continue
        if _is_known(content):
            yield Source(content, split_in_name(Path(name).stem) or split_in_folders(name))


def _is_known(content: Content) -> bool:
    try:
        find_reader(content)
    except UserError:
        return False
    return True


# ---- photos


def _find_images(source: Path, file: Path, unpacked: Path, records: Sequence[Record]) -> Path:
    """The folder in which most of a sample of the photos lie: the first of several. It is printed."""
    if file.is_dir():
        return file
    sample = [record.image for record in records[:: len(records) // SAMPLE + 1]]
    root = source if source.is_dir() else source.parent
    below = (folder for folder, _ in _walk_to(root, MAX_DEPTH))
    candidates = [file.parent, unpacked, *islice(below, MAX_FOLDERS)]
    scores = [sum(_exists(folder / name) for name in sample) for folder in candidates]
    best = candidates[scores.index(max(scores))] if max(scores) else root
    print(f"{file}: photos from {best}")
    return best


def _exists(path: Path) -> bool:
    return path.is_file() or (
        not has_photo_ending(path.name) and any(Path(f"{path}{ending}").is_file() for ending in PHOTO_ENDINGS)
    )
