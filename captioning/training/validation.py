"""How good a model is on the validation photos: what it makes of the true captions, and what it says freely."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from captioning.dataset.batches import Batch
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.decoders.protocol import upcast
from captioning.encoders.images import FailureLimit
from captioning.errors import UserError
from captioning.evaluation.metrics import score
from captioning.runtime.device import autocast
from captioning.runtime.distributed import DistributedContext
from captioning.runtime.signals import StopRequest
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from captioning.training.loss_module import LossModule
from captioning.viewing.preview import Preview, Watched
from preprocess.vocabulary import Vocabulary


class Part(NamedTuple):
    """What one rank found."""

    sums: list[float]  # of cross entropy and top-5 hits over the words, and the words
    captions: dict[str, list[str]]  # of each photo
    unreadable: list[str]
    watched: Watched


class Validation:
    """The photos of a split, and the panel that is drawn of some."""

    def __init__(
        self,
        split: CaptionDataset,
        vocabulary: Vocabulary,
        panel: Preview,
        unreadable: FailureLimit,
        ranks: DistributedContext,
    ):
        self.split, self.vocabulary = split, vocabulary
        self.panel, self.unreadable, self.ranks = panel, unreadable, ranks

    def run(
        self, whole: LossModule, precision: torch.dtype, batches: Iterable[Batch], epoch: int, stop: StopRequest
    ) -> dict:
        """Teacher-forced loss and top-5 accuracy; BLEU-4 and CIDEr-D of captions generated freely (greedily).

        batches: this rank's share of the split. Every photo is scored once, by rank 0; every rank has the figures.
        """
        began = time.monotonic()
        parts = self.ranks.all_gather(self.encode(whole.eval(), precision, batches, stop))
        figures = self.figures(parts, epoch) if self.ranks.is_main else {}
        return self.ranks.broadcast(figures) | {"val_seconds": time.monotonic() - began}

    @torch.no_grad()
    def encode(self, whole: LossModule, precision: torch.dtype, batches: Iterable[Batch], stop: StopRequest) -> Part:
        device = next(whole.parameters()).device
        sums, captions, watched = torch.zeros(3, dtype=torch.float64), {}, {}
        for batch in batches:
            stop.check()
            self.unreadable.add(batch.failures)
            batch = batch.to(device, precision)
            with autocast(device, precision):
                grid = whole.encode(batch)
                scores = upcast(whole.decoder(grid, batch.words, batch.photo_index).logits)
                found = [best for (best,) in beam_search(whole.decoder, grid, SearchOptions(beam_size=1))]
            cross_entropy = F.cross_entropy(scores, batch.targets, reduction="sum")
            if not cross_entropy.isfinite():
                ids = ", ".join(self.split.ids[index] for index in batch.indices[:8])
                raise UserError(
                    f"the loss of the validation photos {ids} is {float(cross_entropy)}; go on with --resume from the "
                    "last good weights, perhaps with --precision float32"
                )
            likelier = scores > scores.gather(1, batch.targets[:, None])  # (W, V): cheaper than sorting
            hits = (likelier.sum(1) < 5).sum()
            sums += torch.tensor([float(cross_entropy), float(hits), len(batch.targets)])
            for index, caption in zip(batch.indices, found, strict=True):
                photo = self.split.ids[index]
                captions[photo] = self.vocabulary.decode(caption.words)
                if photo in self.panel.ids:
                    looked = caption.attention
                    watched[photo] = captions[photo], None if looked is None else looked.numpy()
        return Part(sums.tolist(), captions, list(self.unreadable.reasons), watched)

    def figures(self, parts: list[Part], epoch: int) -> dict:
        """What the ranks found -> the figures of the whole split."""
        for part in parts:
            self.unreadable.add(part.unreadable)
        captions = {photo: words for part in parts for photo, words in part.captions.items()}
        candidates = {photo: captions[photo] for photo in self.split.ids if photo in captions}
        references = {photo: self.split.references(i) for i, photo in enumerate(self.split.ids) if photo in captions}
        scores = score(candidates, references)
        cross_entropy, top5, words = np.sum([part.sums for part in parts], 0).tolist()
        watched = {photo: seen for part in parts for photo, seen in part.watched.items()}
        return {
            "val_loss": cross_entropy / words,
            "top5": top5 / words,
            "BLEU-4": scores["BLEU-4"],
            "CIDEr-D": scores["CIDEr-D"],
            "scored": len(candidates),
            "unreadable": len(self.unreadable.reasons),
            "panel": self.panel.draw(epoch, watched, references, self.vocabulary.joined),
        }
