"""What the steps share: the row of a table, the sizes, random data and runs of the Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from synthetic import coco_lengths, make_photos, make_training_data, make_vocabulary

from captioning.dataset.batches import epoch_order
from captioning.runtime.device import pick_device
from captioning.training.data import TrainingData
from captioning.training.options import TrainingOptions
from preprocess.captions import Photo
from preprocess.vocabulary import Vocabulary

COCO_CAPTIONS = 566_435  # of the train split of COCO
CAPTIONS_PER_PHOTO = 5


class Row(NamedTuple):
    """A line of the table."""

    what: str
    value: float | str
    unit: str = ""
    target: str = ""
    met: bool | None = None  # the target; None without one
    note: str = ""


@dataclass(frozen=True)
class Scale:
    """Sizes, and the seconds that may be spent where more time gives a better figure."""

    device: str
    vocabulary: int = 9490
    side: int = 8  # native cells per side
    channels: int = 2048
    max_words: int = 52  # longer captions are cut
    size: int = 512  # of embedding, keys and hidden state
    matrix_side: int = 8192
    copy_bytes: int = 2**30
    disk_bytes: int = 2**30
    growing_batches: int = 300
    growing_batch_size: int = 128  # captions
    free_gb: float = 12.0  # GPU memory that is left under memory pressure
    gradient_batches: int = 30
    gradient_batch_size: int = 64
    resume_updates: int = 60  # per epoch
    epoch_photos: int = 28_322  # a quarter of COCO
    epoch_batch_sizes: tuple[int, ...] = (512, 1024, 32)
    epoch_seconds: float = 3.0  # for each epoch of what is too slow for a quarter of COCO
    memory_updates: int = 60
    val_photos: int = 5000
    val_updates: int = 300  # before validation, so that captions end
    search_batch_size: int = 500  # photos
    residence_photos: int = 4000
    jpegs: int = 256
    extraction_photos: int = 8192  # the JPEGs repeated
    extraction_batch_size: int = 256
    encoders: tuple[str, ...] = ("resnet101", "timm/vit_base_patch16_clip_quickgelu_224")
    image_size: int = 256
    cider_updates: int = 16
    cider_batch_size: int = 512
    library_batch_size: int = 512


TOY = Scale(
    device="cpu",
    vocabulary=40,
    side=2,
    channels=8,
    max_words=4,
    size=16,
    matrix_side=64,
    copy_bytes=2**16,
    disk_bytes=2**16,
    growing_batches=6,
    growing_batch_size=10,
    gradient_batches=2,
    gradient_batch_size=10,
    resume_updates=4,
    epoch_photos=8,
    epoch_batch_sizes=(10,),
    epoch_seconds=0.1,
    memory_updates=2,
    val_photos=6,
    val_updates=2,
    search_batch_size=4,
    residence_photos=8,
    jpegs=4,
    extraction_photos=6,
    extraction_batch_size=2,
    encoders=("resnet18.layer1",),
    image_size=32,
    cider_updates=2,
    cider_batch_size=10,
    library_batch_size=10,
)


class Setting(NamedTuple):
    """What a step gets."""

    device: torch.device
    scale: Scale
    folder: Path  # to write to; it is removed after the step

    @property
    def vocabulary(self) -> Vocabulary:
        return make_vocabulary(self.scale.vocabulary)

    def options(self, **changes: Any) -> TrainingOptions:
        """The settings of a run: train.py's, with the sizes of the scale."""
        size = self.scale.size
        sizes = {"embedding_size": size, "attention_size": size, "hidden_size": size}
        return TrainingOptions(Path("data"), "bench", **{**sizes, "preview_photos": 0, **changes})

    def photos(self, number: int, lengths: np.ndarray | None = None, split: str = "train") -> list[Photo]:
        """Photos with five captions each, of these lengths or of lengths like those of COCO."""
        rng = np.random.default_rng(0)
        if lengths is None:
            lengths = coco_lengths(rng, CAPTIONS_PER_PHOTO * number)
        lengths = np.minimum(lengths, self.scale.max_words)
        return list(make_photos(rng, self.vocabulary, number, lengths, split))

    def data(self, train: list[Photo], val: list[Photo] | None = None) -> TrainingData:
        """Photos with random features on the device. val: the first photo of train unless given."""
        sizes = (self.scale.side, self.scale.channels)
        return make_training_data(train, val or train[:1], self.vocabulary, *sizes, self.device)

    def growing_data(self, batches: int, batch_size: int, seed: int = 0) -> TrainingData:
        """Captions as long as those of COCO, such that those of the batches of the first epoch get longer and longer.

        seed: of the run, which determines the order of its photos.
        """
        photos = max(1, batch_size // CAPTIONS_PER_PHOTO) * batches
        lengths = np.sort(coco_lengths(np.random.default_rng(1), CAPTIONS_PER_PHOTO * photos))
        by_photo = np.empty_like(lengths).reshape(photos, CAPTIONS_PER_PHOTO)
        by_photo[epoch_order(photos, seed, 0)] = lengths.reshape(by_photo.shape)
        return self.data(self.photos(photos, by_photo.ravel()))


def make_setting(toy: bool, folder: Path) -> Setting:
    """Raises UserError if there is no GPU, unless toy."""
    scale = TOY if toy else Scale(device="cuda")
    device = pick_device(scale.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    return Setting(device, scale, folder)


def not_available(what: str, why: str) -> Row:
    """The row of something that cannot be measured here."""
    return Row(what, "not available", note=why)


class Capture(NamedTuple):
    """The GPU's memory after a CUDA graph was captured, in bytes."""

    pool: int  # of all graphs
    reserved: int  # all of this process


@contextlib.contextmanager
def watch_captures() -> Iterator[list[Capture]]:
    """Collect the memory after each CUDA graph that is captured in the block. It stays empty without a GPU."""
    captures: list[Capture] = []
    original = torch.cuda.CUDAGraph.capture_end

    def capture_end(graph: torch.cuda.CUDAGraph) -> None:
        original(graph)
        segments = torch.cuda.memory_snapshot()
        pools = [part["total_size"] for part in segments if tuple(part.get("segment_pool_id", (0, 0))) != (0, 0)]
        captures.append(Capture(sum(pools), torch.cuda.memory_reserved()))

    with mock.patch.object(torch.cuda.CUDAGraph, "capture_end", capture_end):
        yield captures


def describe_captures(captures: list[Capture]) -> str:
    """How many CUDA graphs were captured, and how their memory grew."""
    if not captures:
        return "no CUDA graph was captured"
    growth = ", ".join(f"{capture.pool / 1e9:.2f}" for capture in captures[:12])
    return f"{len(captures)} captures; GB of the graphs' pool after each: {growth}{' ...' * (len(captures) > 12)}"


@contextlib.contextmanager
def memory_pressure(setting: Setting, free_gb: float) -> Iterator[None]:
    """Leave only these GB of GPU memory in the block, so that the allocator must give back what it caches."""
    if setting.device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(setting.device)
    surplus = max(0, free - int(free_gb * 1e9))
    ballast = torch.empty(surplus, dtype=torch.uint8, device=setting.device)
    try:
        yield
    finally:
        del ballast
        torch.cuda.empty_cache()
