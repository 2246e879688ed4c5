"""Fit how probable it is that a run's captions are good, on the validation photos of its data set.

    python -m captioning.calibrate checkpoints/att
    python -m captioning.calibrate checkpoints/att --beam-size 3
    python -m captioning.calibrate checkpoints/att --good 50        # good: a CIDEr-D of 50 or more

The calibration, with the mean features of training photos, becomes part of the checkpoint: best.pt of the run, or the
given file. Weights that are trained further have none, until they are calibrated again.

Letters: N photos, K captions of a photo.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command  # before torch, which takes seconds to import

    start_command()

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from captioning.captioner import Captioner
from captioning.dataset.caption_dataset import CaptionDataset, photos_in_split
from captioning.encoders.grid import Grid
from captioning.encoders.images import FailureLimit
from captioning.errors import UserError
from captioning.evaluation.calibration import Calibration, Examples, cross_fit, describe, describe_model, fit_models
from captioning.evaluation.candidates import Candidates
from captioning.evaluation.consensus import NGramWeights, mean_with_others
from captioning.features.feature_files import FeatureFiles
from captioning.photo_grids import PhotoGrids, available_rows, cached_grids, encoded_grids, open_matching_features
from captioning.runtime.checkpoint import checkpoint_errors, checkpoint_path, load_checkpoint, save_checkpoint
from captioning.runtime.device import oom_as_user_error
from captioning.runtime.files import locked
from captioning.runtime.loader import lost_worker_as_user_error
from captioning.runtime.progress import tqdm
from captioning.search.options import SearchOptions
from preprocess.captions import Photo, read_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary

if TYPE_CHECKING:
    from config import Calibrate

MEAN_PHOTOS = 1000  # training photos, evenly spaced, whose features are averaged
MIN_PHOTOS = 10  # validation photos: with fewer there is nothing to fit


@dataclass(frozen=True)
class PhotoSource:
    """Where the feature maps of photos come from."""

    captioner: Captioner
    data: Path
    dataset: list[Photo]  # all photos of captions.jsonl
    files: FeatureFiles | None  # cached features; None: the photos are encoded
    batch_size: int
    workers: int
    allow_missing: float

    def grids(self, photos: list[Photo], views: int) -> tuple[int, PhotoGrids]:
        """The number of photos, and their feature maps."""
        if self.files is None:
            return len(photos), self._encoded(photos, views)
        photos, rows = available_rows(self.files, photos, self.data, views, self.allow_missing)
        return len(photos), cached_grids(self.captioner, self.files, photos, rows, self.batch_size)

    def _encoded(self, photos: list[Photo], views: int) -> PhotoGrids:
        """Encode the photos. Raises UserError in the end if too many cannot be read."""
        failures = FailureLimit(len(photos), self.allow_missing)
        yield from encoded_grids(self.captioner, photos, self.batch_size, views, self.workers, failures)
        failures.check()


def calibrate(
    source: PhotoSource,
    search: SearchOptions,
    views: int = 1,
    good: float | None = None,
    photos: int = 0,
) -> Calibration:
    """Caption validation photos and fit the calibration. Raises UserError if that is impossible.

    good: CIDEr-D, 0 to 10, from which a caption is good; None: the median of people's captions. photos: of val at most;
    0 is all.
    """
    captions = CaptionDataset(source.dataset, source.captioner.vocabulary, search.max_length)
    train = photos_in_split(source.dataset, "train", source.data)
    val = photos_in_split(source.dataset, "val", source.data, photos)
    weights = NGramWeights.of(captions.subset(captions.indices_of("train", source.data)))
    references = references_of(captions, captions.indices_of("val", source.data, photos))
    threshold = people_threshold(references, weights, source.data) if good is None else good
    mean_photo = average(source, train[:: max(1, len(train) // MEAN_PHOTOS)])
    candidates, ciders = [], []
    for photo, found in measure(source, val, search, views, mean_photo, weights):
        candidates.append(found)
        ciders.append(cider_of(found, references[photo.id], weights))
    examples = Examples.of(candidates, ciders)
    check_examples(examples, threshold, source.data)
    ranker, models = fit_models(examples, threshold)
    return Calibration(
        search=vars(search),
        views=views,
        threshold=threshold,
        ranker=ranker,
        models=models,
        held_out=cross_fit(examples, threshold),
        mean_photo=mean_photo,
        weights=weights,
    )


def measure(
    source: PhotoSource,
    photos: list[Photo],
    search: SearchOptions,
    views: int,
    mean_photo: Tensor,
    weights: NGramWeights,
) -> Iterator[tuple[Photo, Candidates]]:
    """Find the candidates of each photo that has features or can be read."""
    count, batches = source.grids(photos, views)
    with tqdm(total=count, unit="photo", desc="caption") as bar:
        for batch, grids in batches:
            of_batch = source.captioner.find_candidates(grids, search, mean_photo, weights)
            for photo, candidates in zip(batch, of_batch, strict=True):
                for caption in candidates.captions:
                    caption.attention = None  # of all photos it would take hundreds of megabytes
                yield photo, candidates
            bar.update(len(batch))


def references_of(captions: CaptionDataset, indices: np.ndarray) -> dict[str, list[list[int]]]:
    """The captions of each of these photos, by its id, as word ids; unknown words have ids beyond the vocabulary."""
    references = {}
    for photo in indices:
        first, end = captions.photo_offsets[photo : photo + 2]
        offsets = captions.caption_offsets[first : end + 1]
        references[captions.ids[photo]] = [words.tolist() for words in _slices(captions.words, offsets)]
    return references


def _slices(values: np.ndarray, offsets: np.ndarray) -> Iterable[np.ndarray]:
    return (values[start:end] for start, end in zip(offsets[:-1], offsets[1:], strict=True))


def people_threshold(references: dict[str, list[list[int]]], weights: NGramWeights, data: Path) -> float:
    """The median over people's captions of the CIDEr-D, 0 to 10, with the other captions of their photo.

    Raises UserError if every photo has a single caption.
    """
    several = [own for own in references.values() if len(own) > 1]
    if not several:
        raise UserError(
            f"{data}: every val photo has one caption, so people's captions cannot be compared; say when a caption is "
            "good: --good 50 (CIDEr-D times 100)"
        )
    return float(np.median(np.concatenate([mean_with_others(matrix) for matrix in weights.agreement(several)])))


def average(source: PhotoSource, photos: list[Photo]) -> Tensor:
    """The mean feature map of photos, (h, w, C) float32; (1, 1, C) for a decoder that reads only its mean."""
    total: Tensor | float = 0.0
    number = 0
    _, batches = source.grids(photos, views=1)
    for _, (grid,) in batches:
        total = total + sum_over_photos(source.captioner, grid)
        number += len(grid)
    assert isinstance(total, Tensor)
    side = round(len(total) ** 0.5)  # photos are resized to squares
    return (total / number).reshape(side, side, -1).float()


def sum_over_photos(captioner: Captioner, grid: Grid) -> Tensor:
    """(N, C) float64 on the CPU; N is 1 for a decoder that reads only the mean."""
    cells = grid.cells if captioner.decoder.uses_attention else grid.mean()[:, None]
    return cells.double().sum(0).cpu()


def cider_of(candidates: Candidates, references: list[list[int]], weights: NGramWeights) -> np.ndarray:
    """The CIDEr-D, 0 to 10, of each candidate with people's captions: (K,) float64."""
    (matrix,) = weights.agreement([[*(caption.words for caption in candidates.captions), *references]])
    return matrix[: len(candidates.captions), len(candidates.captions) :].mean(1)


def check_examples(examples: Examples, threshold: float, data: Path) -> None:
    """Raise UserError if there are too few photos, or if all captions are good, or none."""
    photos = len(examples.candidates)
    if photos < MIN_PHOTOS:
        raise UserError(f"{data}: {photos} val photos are too few to calibrate on; {MIN_PHOTOS} or more are needed")
    goods = sum(bool(ciders[0] >= threshold) for ciders in examples.ciders)
    if not 0 < goods < photos:
        which = "none of" if not goods else "all"
        raise UserError(
            f"{data}: {which} the {photos:,} captions have a CIDEr-D of {100 * threshold:.1f} or more; give another "
            "--good, such as the CIDEr-D of the run"
        )


def run_source(run: Path, captioner: Captioner, checkpoint: dict, config: Calibrate) -> PhotoSource:
    """The data set and the features of a run. Raises UserError if the vocabulary of the data set is another one."""
    with checkpoint_errors(run):
        trained_on = checkpoint["config"]
        data = config.data or Path(trained_on["data"])
        own_features = tuple(Path(path) for path in trained_on.get("features") or ())
    if Vocabulary.load(data / VOCABULARY_FILE) != captioner.vocabulary:
        raise UserError(
            f"{data}: has another vocabulary than {run}, which was trained on {trained_on['data']}; give that one"
        )
    features = config.features or (() if config.data else own_features)
    dataset = list(read_captions(data))
    ids = [photo.id for photo in dataset]
    files = open_matching_features(captioner, run, data, ids, features, config.views, config.allow_missing)
    return PhotoSource(captioner, data, dataset, files, config.batch_size, config.workers, config.allow_missing)


def main(config: Calibrate) -> None:
    """Calibrate a run and write its checkpoint. Raises UserError."""
    started = time.monotonic()
    path = checkpoint_path(config.run)
    checkpoint = load_checkpoint(path)
    captioner = Captioner.load(path, config.device, config.precision, trust=False)
    source = run_source(config.run, captioner, checkpoint, config)
    torch.manual_seed(config.seed)
    good = None if config.good == "people" else float(config.good) / 100
    calibration = calibrate(source, config.search, config.views, good, config.photos)
    save_checkpoint(path, {**checkpoint, "calibration": calibration.to_dict()})
    photos = len(calibration.held_out["probability"].good)
    print(f"\n{describe(calibration)}\n\n{explain(calibration, photos)}")
    print(f"{path}: calibrated on {photos:,} photos of {source.data} in {time.monotonic() - started:.0f} s")


def explain(calibration: Calibration, photos: int) -> str:
    """What the table of `describe` shows."""
    return (
        f"{photos:,} photos, each predicted by the half of them without it; CIDEr-D times 100, weighted as in train; "
        f"good: {100 * calibration.threshold:.1f} or more; error: expected calibration error, by tenths of the "
        f"captions, and what chance alone would make it; best fifth: CIDEr-D of the most probable fifth\n"
        f"weights per standard deviation: {describe_model(calibration)}"
    )


def work(config: Calibrate) -> None:
    """`main`, with the run locked and a message if memory runs out."""
    folder = checkpoint_path(config.run).parent
    remedy = f"lower --batch-size {config.batch_size}"
    with lost_worker_as_user_error(), oom_as_user_error(remedy), locked(folder, folder / ".lock"):
        main(config)


if __name__ == "__main__":
    from captioning.runtime.command_line import run
    from config import Calibrate

    run(Calibrate, work)
