"""Download files of npm packages, once: from a CDN, or, if it does not answer within seconds, with npm."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from captioning.errors import UserError
from captioning.runtime.files import atomic_write, write_errors

CDN = "https://unpkg.com/{package}@{version}/{path}"
TIMEOUT = 4.0  # seconds without an answer; after the first timeout all remaining packages come from npm


class Source(NamedTuple):
    """An npm package, and those of its files that are needed."""

    package: str  # its name in the npm registry
    version: str
    paths: Mapping[str, str]  # path in the package -> path in the folder of the downloaded files
    sha256: Mapping[str, str] = {}  # path in the package -> hash of the file; files without one are not compared


Download = Callable[[Source], dict[str, bytes]]  # returns path in the package -> content


def fetch(sources: Sequence[Source], folder: Path, page: str) -> None:
    """Download the files of `sources` into `folder`, unless they are there.

    page: what needs them, such as "visdom's page". Raises UserError if they cannot be downloaded.
    """
    missing = [source for source in sources if not is_fetched(source, folder)]
    if not missing:
        return
    print(f"downloading the scripts of {page}, once")
    downloads: list[Download] = [_download_from_cdn, _download_from_npm]
    reasons: list[str] = []
    for source in missing:
        files = _fetch(source, downloads, reasons, page)
        for path, target in source.paths.items():
            _write(folder / target, files[path])


def is_fetched(source: Source, folder: Path) -> bool:
    """Whether all files of a package are in `folder`, with the hashes of `source`."""
    files = {path: folder / target for path, target in source.paths.items()}
    if not all(file.exists() for file in files.values()):
        return False
    return not _wrong_files(source, {path: files[path].read_bytes() for path in source.sha256})


def _fetch(source: Source, downloads: list[Download], reasons: list[str], page: str) -> dict[str, bytes]:
    """Download a package by the first method that works.

    A method that fails is removed from `downloads`, so that it is not tried again, and its error added to `reasons`.
    """
    while downloads:
        try:
            files = downloads[0](source)
            wrong = _wrong_files(source, files)
            if wrong:
                raise OSError(f"{source.package}@{source.version}: {wrong[0]} is not the file that was tested")
            return files
        except OSError as error:
            reasons.append(str(error))
            downloads.pop(0)
    raise UserError(
        f"{page} needs scripts that could not be downloaded ({'; '.join(reasons)}); connect this machine to the "
        "internet once, or install npm (apt install npm) where a registry can be reached, and start again"
    )


def _wrong_files(source: Source, files: Mapping[str, bytes]) -> list[str]:
    """Paths of files whose content has another hash than `source` gives."""
    return [path for path, digest in source.sha256.items() if hashlib.sha256(files[path]).hexdigest() != digest]


def _download_from_cdn(source: Source) -> dict[str, bytes]:
    files = {}
    for path in source.paths:
        url = CDN.format(package=source.package, version=source.version, path=path)
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            files[path] = response.read()
    return files


def _download_from_npm(source: Source) -> dict[str, bytes]:
    """Download a package with `npm pack`. Raises OSError if npm is missing, fails, or brings another version."""
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    name = f"{source.package}@{source.version}"
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run([npm, "pack", "--silent", name], cwd=folder, capture_output=True, text=True)
        archives = list(Path(folder).glob("*.tgz"))
        if result.returncode or not archives:
            raise OSError(f"npm pack {name} failed")
        with tarfile.open(archives[0]) as archive:  # read in memory: the archive cannot choose where its files go
            version = json.loads(_read_member(archive, "package.json"))["version"]
            if version != source.version:
                raise OSError(f"npm pack {name} brought {version}")
            return {path: _read_member(archive, path) for path in source.paths}


def _read_member(archive: tarfile.TarFile, path: str) -> bytes:
    member = archive.extractfile(f"package/{path}")
    if member is None:
        raise OSError(f"{path} is not a file")
    return member.read()


def _write(path: Path, content: bytes) -> None:
    """Write atomically: a file that exists is complete."""
    with write_errors(path, "free some space, or run as a user who may write there"), atomic_write(path) as file:
        file.write(content)
