"""Validation: the teacher-forced loss of the val split, and the scores of captions generated greedily."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captioning.caption import Caption
from captioning.dataset.batches import Batch
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.decoders.protocol import upcast
from captioning.encoders.images import FailureLimit
from captioning.errors import UserError
from captioning.evaluation.metrics import (
    aggregate,
    bootstrap,
    by_name,
    confidence_interval,
    per_image_stats,
    uninformative,
)
from captioning.runtime.device import autocast
from captioning.runtime.distributed import SINGLE, DistributedContext
from captioning.runtime.signals import StopRequest
from captioning.search.beam_search import beam_search
from captioning.search.graphs import DecodingGraphs
from captioning.search.options import SearchOptions
from captioning.training.loss_module import LossModule
from captioning.viewing.preview import Preview, PreviewCaptions
from preprocess.vocabulary import Vocabulary

VALIDATION_METRICS = ("BLEU-4", "CIDEr-D")
TOP_K = 5
BATCH_SIZE = 160  # captions: larger than in training, since no activations are kept
LARGEST_BATCH = 2048  # captions: a GPU is then busy
MEMORY_FRACTION = 1 / 16  # of a GPU's memory, for one batch
BYTES_PER_LOGIT = 12  # float32, its log-softmax, the half precision it came from, comparisons
ATTENTION_BYTES = 2**20  # about the cells, keys and attention of a photo, or of a caption in teacher forcing
CHECK_INTERVAL = 8  # batches between reading the losses from a GPU, which waits for it


class ShardResult(NamedTuple):
    """The validation results of one process."""

    sums: list[float]  # cross entropy and top-5 hits, summed over the words, and the number of words
    captions: dict[str, list[str]]  # photo id -> words
    failures: list[str]  # photos that could not be read
    preview_captions: PreviewCaptions


class Sums:
    """Cross entropy, top-5 hits and words, summed over the batches; on a GPU they stay there for several batches."""

    def __init__(self, device: torch.device):
        self.interval = 1 if device.type == "cpu" else CHECK_INTERVAL
        self.total = np.zeros(3)
        self.pending: list[tuple[Tensor, int, list[str]]] = []  # of each batch: (2,) on the device, words, photos

    def add(self, logits: Tensor, targets: Tensor, photos: list[str]) -> None:
        """Add a batch: logits (W, V), targets (W,), the ids of its photos. Raises UserError as `read` does."""
        cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
        likelier = logits > logits.gather(1, targets[:, None])  # (W, V); cheaper than topk
        hits = (likelier.sum(1) < TOP_K).sum()
        self.pending.append((torch.stack([cross_entropy, hits.to(cross_entropy)]), len(targets), photos))
        if len(self.pending) >= self.interval:
            self.read()

    def read(self) -> list[float]:
        """The sums so far. Raises UserError, naming the photos of the batch, if a loss is not finite."""
        if self.pending:
            values, words, photos = zip(*self.pending, strict=True)
            self.pending = []
            for (cross_entropy, hits), count, ids in zip(torch.stack(values).tolist(), words, photos, strict=True):
                if not math.isfinite(cross_entropy):
                    raise _not_finite(ids, cross_entropy)
                self.total += cross_entropy, hits, count
        return self.total.tolist()


def _not_finite(photos: list[str], loss: float) -> UserError:
    return UserError(
        f"the loss of the validation photos {', '.join(photos[:8])} is {loss}; continue from the last checkpoint with "
        "--resume; if it happens again, add --precision float32"
    )


class Validation:
    """Computes the metrics of a split, and draws the preview of some of its photos."""

    def __init__(
        self,
        split: CaptionDataset,
        vocabulary: Vocabulary,
        preview: Preview,
        failures: FailureLimit,
        max_length: int,
        distributed: DistributedContext = SINGLE,
        graphs: DecodingGraphs | None = None,
    ):
        """max_length: words per generated caption. graphs: generate captions in CUDA graphs."""
        self.split = split
        self.vocabulary = vocabulary
        self.preview = preview
        self.failures = failures
        self.search = SearchOptions(beam_size=1, max_length=max_length)
        self.distributed = distributed
        self.graphs = graphs

    def run(
        self, loss_module: LossModule, precision: torch.dtype, batches: Iterable[Batch], epoch: int, stop: StopRequest
    ) -> dict:
        """Return the metrics of the split, on every process. Leaves the loss module in eval mode.

        batches: this process's shard of the split. epoch: from 1, names the files of the preview.
        """
        start = time.monotonic()
        shard = self.evaluate_shard(loss_module.eval(), precision, batches, stop)
        shards = self.distributed.all_gather(shard)
        metrics = self.merge(shards, epoch) if self.distributed.is_main else {}
        return self.distributed.broadcast(metrics) | {"val_seconds": time.monotonic() - start}

    @torch.no_grad()
    def evaluate_shard(
        self, loss_module: LossModule, precision: torch.dtype, batches: Iterable[Batch], stop: StopRequest
    ) -> ShardResult:
        """Compute the results of this process's batches.

        Raises UserError if a loss is not finite, or too many photos cannot be read.
        """
        device = next(loss_module.parameters()).device
        sums = Sums(device)
        captions: dict[str, list[str]] = {}
        preview_captions: PreviewCaptions = {}
        for batch in batches:
            stop.check()
            self.failures.add(batch.failures)
            batch = batch.to(device, precision)
            with autocast(device, precision):
                grid = loss_module.encode(batch)
                logits = upcast(loss_module.decoder(grid, batch.words, batch.photo_index).logits)
                generated = beam_search(loss_module.decoder, grid, self.search, self.graphs)
            photos = [self.split.ids[index] for index in batch.indices]
            sums.add(logits, batch.targets, photos)
            if not all(generated):  # no hypothesis has a probability that is a number
                sums.read()
                raise _not_finite(photos, torch.nan)
            for photo, (caption,) in zip(photos, generated, strict=True):
                captions[photo] = self.vocabulary.decode(caption.words)
                if photo in self.preview.ids:
                    preview_captions[photo] = captions[photo], _attention_array(caption)
        return ShardResult(sums.read(), captions, list(self.failures.reasons), preview_captions)

    def merge(self, shards: list[ShardResult], epoch: int) -> dict:
        """Return the metrics of the whole split, with the log's entries of the preview."""
        captions: dict[str, list[str]] = {}
        preview_captions: PreviewCaptions = {}
        for shard in shards:
            self.failures.add(shard.failures)
            captions |= shard.captions
            preview_captions |= shard.preview_captions
        scored = [index for index, photo in enumerate(self.split.ids) if photo in captions]
        candidates = {self.split.ids[index]: captions[self.split.ids[index]] for index in scored}
        references = {self.split.ids[index]: self.split.references(index) for index in scored}
        stats = per_image_stats(candidates, references)
        scores = by_name(aggregate(stats))
        intervals = by_name(confidence_interval(bootstrap(stats)))
        reasons = uninformative(candidates, references)
        cross_entropy, top5, words = np.sum([shard.sums for shard in shards], 0).tolist()
        return {
            "val_loss": cross_entropy / words,
            "top5": top5 / words,
            **{metric: scores[metric] for metric in VALIDATION_METRICS},
            "intervals": {metric: intervals[metric] for metric in VALIDATION_METRICS},
            "uninformative": {metric: reasons[metric] for metric in VALIDATION_METRICS if metric in reasons},
            "scored": len(candidates),
            "unreadable": len(self.failures.reasons),
            "preview": self.preview.draw(epoch, preview_captions, references, self.vocabulary.join),
        }


def validation_batch_size(split: CaptionDataset, vocabulary_size: int, device: torch.device, processes: int = 1) -> int:
    """The captions of a validation batch, of which each process gets some. The metrics do not depend on it.

    Small batches do not fill a GPU: there, as many captions as a fraction of its memory holds, mostly logits.
    """
    captions = int(split.photo_offsets[-1])
    if device.type != "cuda" or not captions:
        return BATCH_SIZE
    words = float(split.target_counts().sum()) / captions
    per_caption = BYTES_PER_LOGIT * words * vocabulary_size + ATTENTION_BYTES * (1 + len(split) / captions)
    memory = MEMORY_FRACTION * torch.cuda.get_device_properties(device).total_memory
    share = math.ceil(captions / processes)
    return max(BATCH_SIZE, min(LARGEST_BATCH, share, int(memory / per_caption)))


def _attention_array(caption: Caption) -> np.ndarray | None:
    """(T, P), or None without attention."""
    return None if caption.attention is None else caption.attention.numpy()
