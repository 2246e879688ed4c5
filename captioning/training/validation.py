"""Validation: the teacher-forced loss of the val split, and the scores of captions generated greedily."""

from __future__ import annotations

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
from captioning.evaluation.metrics import score
from captioning.runtime.device import autocast
from captioning.runtime.distributed import SINGLE, DistributedContext
from captioning.runtime.signals import StopRequest
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from captioning.training.loss_module import LossModule
from captioning.viewing.preview import Preview, PreviewCaptions
from preprocess.vocabulary import Vocabulary

TOP_K = 5


class ShardResult(NamedTuple):
    """The validation results of one process."""

    sums: list[float]  # cross entropy and top-5 hits, summed over the words, and the number of words
    captions: dict[str, list[str]]  # photo id -> words
    failures: list[str]  # photos that could not be read
    preview_captions: PreviewCaptions


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
    ):
        """max_length: words per generated caption."""
        self.split = split
        self.vocabulary = vocabulary
        self.preview = preview
        self.failures = failures
        self.search = SearchOptions(beam_size=1, max_length=max_length)
        self.distributed = distributed

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
        sums = torch.zeros(3, dtype=torch.float64)
        captions: dict[str, list[str]] = {}
        preview_captions: PreviewCaptions = {}
        for batch in batches:
            stop.check()
            self.failures.add(batch.failures)
            batch = batch.to(device, precision)
            with autocast(device, precision):
                grid = loss_module.encode(batch)
                logits = upcast(loss_module.decoder(grid, batch.words, batch.photo_index).logits)
                generated = [best for (best,) in beam_search(loss_module.decoder, grid, self.search)]
            sums += self._sums(logits, batch)
            for index, caption in zip(batch.indices, generated, strict=True):
                photo = self.split.ids[index]
                captions[photo] = self.vocabulary.decode(caption.words)
                if photo in self.preview.ids:
                    preview_captions[photo] = captions[photo], _attention_array(caption)
        return ShardResult(sums.tolist(), captions, list(self.failures.reasons), preview_captions)

    def _sums(self, logits: Tensor, batch: Batch) -> Tensor:
        """logits (W, V) -> (3,): cross entropy, top-5 hits and words. Raises UserError if the loss is not finite."""
        cross_entropy = F.cross_entropy(logits, batch.targets, reduction="sum")
        if not cross_entropy.isfinite():
            ids = ", ".join(self.split.ids[index] for index in batch.indices[:8])
            raise UserError(
                f"the loss of the validation photos {ids} is {float(cross_entropy)}; continue from the last checkpoint "
                "with --resume; if it happens again, add --precision float32"
            )
        likelier = logits > logits.gather(1, batch.targets[:, None])  # (W, V); cheaper than topk
        hits = (likelier.sum(1) < TOP_K).sum()
        return torch.tensor([float(cross_entropy), float(hits), len(batch.targets)])

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
        scores = score(candidates, references)
        cross_entropy, top5, words = np.sum([shard.sums for shard in shards], 0).tolist()
        return {
            "val_loss": cross_entropy / words,
            "top5": top5 / words,
            "BLEU-4": scores["BLEU-4"],
            "CIDEr-D": scores["CIDEr-D"],
            "scored": len(candidates),
            "unreadable": len(self.failures.reasons),
            "preview": self.preview.draw(epoch, preview_captions, references, self.vocabulary.join),
        }


def _attention_array(caption: Caption) -> np.ndarray | None:
    """(T, P), or None without attention."""
    return None if caption.attention is None else caption.attention.numpy()
