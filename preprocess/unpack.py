"""Archives and tables that hold photos: the photos are unpacked once, to a folder under the data set."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioning.errors import UserError
from captioning.runtime.files import atomic_write, write_errors
from captioning.runtime.library_errors import reason
from captioning.runtime.progress import tqdm
from preprocess.columns import Columns
from preprocess.folders import CAPTION_ENDINGS, has_photo_ending, is_hidden

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
PARQUET_MAGIC = b"PAR1"
ROWS_AT_ONCE = 256  # photos of some megabytes each
IMAGE_MAGIC = {b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def is_tar(path: Path) -> bool:
    """Whether a path is a tar by its name."""
    return path.name.lower().endswith(TAR_ENDINGS) and path.is_file()


def unpack_tars(root: Path, tars: list[Path], folder: Path) -> Path:
    """Write the photos and their captions to `folder`, each tar's to its path below `root`. Returns `folder`.

    What is there with the same size is kept. Links, hidden files and paths that lead elsewhere are passed over.
    Raises UserError for a file that is not a tar, or breaks off.
    """
    print(f"{folder}: unpacking the photos of {len(tars):,} tar files")
    for tar in tqdm(tars, "unpacking", unit=" tars"):
        stem = tar.name[: -len(next(ending for ending in TAR_ENDINGS if tar.name.lower().endswith(ending)))]
        try:
            with tarfile.open(tar) as archive:
                for name, member in _wanted_members(archive).items():
                    file = archive.extractfile(member)
                    if file:
                        _write_once(folder / tar.parent.relative_to(root) / stem / name, file.read())
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{tar}: not a whole tar file ({reason(error)}); download it again") from None
        except OSError as error:
            raise UserError(f"{tar}: cannot be read ({reason(error)}); check the file and its permissions") from None
    return folder


def _wanted_members(archive: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """The photos of a tar and their captions, by their paths. Of .txt and .json (img2dataset), .txt is enough."""
    members = {name: member for member in archive.getmembers() if (name := _safe_name(member))}
    return {
        name: member
        for name, member in members.items()
        if not name.endswith(".json") or f"{name.removesuffix('.json')}.txt" not in members
    }


def _safe_name(member: tarfile.TarInfo) -> str | None:
    """The path of a member that is a photo, a text or JSON; None for all others."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    wanted = member.isfile() and parts and (has_photo_ending(parts[-1]) or parts[-1].endswith(CAPTION_ENDINGS))
    if not wanted or any(is_hidden(part) or "\\" in part or "\0" in part or part == ".." for part in parts):
        return None
    return "/".join(parts)


def _write_once(path: Path, data: bytes) -> None:
    if path.is_file() and path.stat().st_size == len(data):
        return
    with write_errors(path, "free space, or give another data folder"), atomic_write(path) as file:
        file.write(data)


def is_parquet(path: Path) -> bool:
    """Whether a file begins like Parquet."""
    try:
        with open(path, "rb") as file:
            return file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    except OSError:
        return False


def read_parquet(path: Path, columns: Columns, folder: Path | None) -> list[dict[str, object]]:
    """The rows of a Parquet file: photo, caption and split, each if there is such a column.

    Photos inside the file (a column of bytes, or Hugging Face's {"bytes", "path"}) are written to `folder`, batch by
    batch, unless it is None; their rows name them. Raises UserError without pyarrow, and for a damaged file.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; install it with: pip install 'kantu[parquet]'") from None
    try:
        file = parquet.ParquetFile(path)
        found = columns.find(file.schema_arrow.names)
        if found is None:
            return [dict.fromkeys(file.schema_arrow.names)]
        wanted = [column for column in found if column]
        batches = file.iter_batches(ROWS_AT_ONCE, columns=wanted)
        rows: list[dict[str, object]] = []
        for row in _rows(batches, path, file.metadata.num_rows):
            row[found[0]] = _photo_name(row[found[0]], f"{path.stem}/{len(rows):08d}", folder)
            rows.append(row)
        return rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({reason(error)}); download it again") from None


def _rows(batches: Any, path: Path, total: int) -> Iterator[dict[str, object]]:
    with tqdm(total=total, desc=f"reading {path.name}", unit=" rows") as bar:
        for batch in batches:
            yield from batch.to_pylist()
            bar.update(batch.num_rows)


def _photo_name(value: object, number: str, folder: Path | None) -> object:
    """The name of a row's photo. One inside the file is written to `folder` under its number."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or folder is None:
        return value.get("path") if isinstance(value, dict) else value
    ending = next((ending for magic, ending in IMAGE_MAGIC.items() if data.startswith(magic)), ".jpg")
    name = f"{number}{ending}"
    _write_once(folder / name, data)
    return os.path.normpath(name)
