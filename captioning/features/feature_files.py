"""Several feature files of one encoder, read as one: views of the photos (encoders/views.py) and parts of a data set.

The rows of all files are numbered through: file f has the numbers from starts[f] on.

Letters: N photos, F files, V views, B photos per batch, C channels.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from captioning.encoders.grid import Grid
from captioning.encoders.loading import encoder_file
from captioning.encoders.views import WHOLE, View
from captioning.errors import UserError
from captioning.features.cached_grid import FeatureRows
from captioning.features.feature_reader import FeatureReader, check_finite
from captioning.features.recipe import first_difference


class FeatureFiles:
    """Reads rows of feature files with the same recipe: all attributes but the view are equal."""

    def __init__(self, readers: Sequence[FeatureReader]):
        """Raises UserError if a file has another recipe than the first."""
        self.readers = readers
        for reader in readers[1:]:
            if difference := recipe_difference(reader, readers[0]):
                raise UserError(f"{reader.path}: cannot be used with {readers[0].path}: {difference}; leave it out")
        self.starts = np.cumsum([0, *(len(reader.ids) for reader in readers[:-1])])  # (F,)
        self.views = sorted({reader.view for reader in readers}, key=lambda view: (view != WHOLE, str(view)))

    def __str__(self) -> str:
        return ", ".join(str(reader.path) for reader in self.readers)

    @property
    def first(self) -> FeatureReader:
        """The first file: its attributes but the view are those of all."""
        return self.readers[0]

    def locate(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each photo in each file, (N, F) int64, numbered within the file; -1 if it is not there."""
        index = {photo: i for i, photo in enumerate(ids)}
        rows = np.full((len(ids), len(self.readers)), -1)
        for number, reader in enumerate(self.readers):
            places = np.fromiter((index.get(photo, -1) for photo in reader.ids), np.int64)
            rows[places[places >= 0], number] = np.flatnonzero(places >= 0)
        return rows

    def check_dataset(self, located: np.ndarray, dataset: Path) -> None:
        """Raise UserError if a file has none of the photos of a data set, whose rows are `located` (N, F)."""
        for reader, rows in zip(self.readers, located.T, strict=True):
            if not (rows >= 0).any():
                raise UserError(
                    f"{reader.path}: belongs to another data set: no features for {len(rows):,} of {len(rows):,} "
                    f"images; run: {command_to_replace(reader, dataset)}"
                )

    def rows_of_views(self, located: np.ndarray) -> np.ndarray:
        """The row of each photo and view, (N, V) int64, numbered through all files; -1 if no file has it done.

        located: from `locate`. The first file that has a photo done counts: the others have the same features.
        """
        rows = np.full((len(located), len(self.views)), -1)
        for number, reader in enumerate(self.readers):
            file_rows = located[:, number]
            column = rows[:, self.views.index(reader.view)]  # a view: writing to it fills `rows`
            found = (file_rows >= 0) & (column < 0) & reader.done()[file_rows]
            column[found] = file_rows[found] + self.starts[number]
        return rows

    def available(self, rows: np.ndarray, view: View, allow_missing: float, dataset: Path) -> np.ndarray:
        """Which photos have this view, (N,) bool, given the rows of all views (N, V).

        Raises UserError if a larger fraction than `allow_missing` lacks it.
        """
        available = rows[:, self.views.index(view)] >= 0
        missing = int((~available).sum())
        if missing > allow_missing * len(available):
            paths = ", ".join(str(reader.path) for reader in self.readers if reader.view == view)
            command = f"python extract_features.py {shlex.quote(str(dataset))}"
            if view != WHOLE:
                command += f" --view {view}"
            raise UserError(f"{paths}: no features for {missing:,} of {len(available):,} images; run: {command}")
        return available

    def pooling(self, pooled: bool) -> Tensor:
        """P of the maps, or of their means: see `FeatureReader.pooling`."""
        return self.first.pooling(pooled)

    def read(self, rows: np.ndarray, pooled: bool = False) -> Grid:
        """The feature maps, or their means, of rows (B,) int64. Raises UserError if a row is not finite."""
        return self.first.to_grid(self.read_rows(rows, pooled), pooled)

    def read_rows(self, rows: np.ndarray, pooled: bool = False) -> FeatureRows:
        """Rows (B,) int64, numbered through all files: see `FeatureReader.read_rows`."""
        target = self.first.empty_rows(len(rows), pooled)
        files = np.searchsorted(self.starts, rows, "right") - 1
        for number in np.unique(files):
            places = np.flatnonzero(files == number)
            self.readers[number].read_into(target, places, rows[places] - self.starts[number], pooled)
        check_finite(target, lambda i: (self.readers[files[i]], rows[i] - self.starts[files[i]]))
        return target


def command_to_replace(reader: FeatureReader, dataset: Path) -> str:
    """The command that replaces a feature file by one of another data set, with the same settings and encoder."""
    found, view = reader.recipe, reader.view
    options = {"weights": encoder_file(reader.path), "grid": found["grid"], "dtype": found["dtype"]}
    options |= {"precision": found["precision"]}
    options |= {"view": view} if view != WHOLE else {}
    options |= {"out": reader.path} if reader.path != view.file(dataset / "features.h5") else {}
    flags = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items()]
    flags += ["--nvjpeg"] if found["nvjpeg"] else []
    return f"python extract_features.py {shlex.quote(str(dataset))} {' '.join(flags)} --overwrite"


def recipe_difference(reader: FeatureReader, other: FeatureReader) -> str:
    """In words, how the recipe of a file differs from that of another one; empty if only the view may differ."""
    found, expected = reader.recipe, other.recipe
    name = first_difference(found, expected)
    return f"it was extracted with {name} {found.get(name)}, not {expected[name]}" if name else ""


def find_feature_files(data: Path) -> list[Path]:
    """features.h5 of a data folder and all features.*.h5 beside it; features.h5 also if there is none at all."""
    whole = data / "features.h5"
    others = sorted(data.glob("features.*.h5"))
    return [whole, *others] if whole.exists() or not others else others


def open_feature_files(
    paths: Sequence[Path], data: Path, pin: bool = False, views: Iterable[str] | None = None
) -> FeatureFiles:
    """Open the given files; without any those of the data folder, without those of another recipe, which are named.

    views: without paths, use only files of these views. Raises UserError if a file cannot be read, if the recipes of
    given files differ, or if none holds the whole photos.
    """
    readers = [FeatureReader(path, pin) for path in paths or find_feature_files(data)]
    if not paths:
        if views is not None:
            wanted = {*views}
            readers = [reader for reader in readers if str(reader.view) in wanted] or readers
        readers = [reader for reader in readers if _is_usable(reader, readers[0])]
    files = FeatureFiles(readers)
    if WHOLE not in files.views:
        raise UserError(
            f"{files}: only {' and '.join(map(str, files.views))} photos, but captions that say left or right, and "
            "validation, need the whole ones; give their file too"
        )
    return files


def _is_usable(reader: FeatureReader, first: FeatureReader) -> bool:
    difference = recipe_difference(reader, first)
    if difference:
        print(f"{reader.path}: not used with {first.path}: {difference}")
    return not difference
