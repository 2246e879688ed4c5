"""The quality of captions that continue a reference: does a decoder lose more at the start of captions, or later?

    python bench/beginnings.py data/f8k-zh checkpoints/zh-attention checkpoints/zh-adaptive

The first n words of a reference are given and greedy decoding writes the rest. Its CIDEr-D is against the other
references of the photo, averaged over the first --captions references. The given words add the same to every run.
The second line is the cross entropy of the reference words by position, with teacher forcing.

Letters: B photos, n given words.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tyro.conf import Positional

from captioning.captioner import Captioner
from captioning.dataset.caption_dataset import CaptionDataset, photos_in_split
from captioning.decoders.protocol import Decoder
from captioning.encoders.grid import Grid
from captioning.encoders.images import split_batches
from captioning.evaluation.metrics import score
from captioning.features.feature_reader import FeatureReader
from preprocess.captions import Photo, read_captions
from preprocess.vocabulary import END, PAD, START, UNKNOWN

MAX_LENGTH = 20  # words per caption


@dataclass(frozen=True)
class Bench:
    data: Positional[Path]
    runs: Positional[tuple[Path, ...]]  # folders of checkpoints/
    features: Path | None = None  # data/NAME/features.h5 unless given
    split: str = "val"
    words: int = 4  # given words at most
    captions: int = 3  # references per photo whose first words are given
    batch_size: int = 100  # photos


def continue_greedily(decoder: Decoder, grid: Grid, given: Tensor) -> Tensor:
    """given (B, n) int64, with PAD after <end> -> the given words and their continuation (B, MAX_LENGTH) int64."""
    state = decoder.init_state(grid)
    words = torch.full((len(grid),), START)
    written = []
    for step in range(MAX_LENGTH):
        log_probabilities, _, state, _ = decoder.step(words, state)
        log_probabilities[:, [PAD, UNKNOWN, START]] = -torch.inf  # never generated
        words = given[:, step] if step < given.shape[1] else log_probabilities.argmax(1)
        written.append(words)
    return torch.stack(written, 1)


def continuation_cider(
    captioner: Captioner, reader: FeatureReader, photos: list[Photo], words: int, index: int, batch_size: int
) -> float:
    """CIDEr-D of captions that continue the first `words` words of the reference `index` of each photo."""
    candidates: dict[str, list[str]] = {}
    references: dict[str, list] = {}
    for batch in split_batches(photos, batch_size):
        captions = [photo.captions[index % len(photo.captions)] for photo in batch]
        given = torch.full((len(batch), words), PAD)
        for row, caption in zip(given, captions, strict=True):
            ids = [*captioner.vocabulary.encode(caption), END][:words]
            row[: len(ids)] = torch.tensor(ids)
        grid = reader.read(reader.rows_of([photo.id for photo in batch])).to(captioner.device, torch.float32)
        rows = continue_greedily(captioner.decoder, grid, given).tolist()
        for photo, caption, row in zip(batch, captions, rows, strict=True):
            row = row[: row.index(END)] if END in row else row
            # The given words as text: some may not be in the vocabulary.
            candidates[photo.id] = [*caption[:words], *captioner.vocabulary.decode(row[words:])]
            references[photo.id] = [other for other in photo.captions if other is not caption] or [caption]
    return score(candidates, references)["CIDEr-D"]


def loss_by_position(
    captioner: Captioner, reader: FeatureReader, split: CaptionDataset, batch_size: int
) -> list[float]:
    """The mean of -log p(y_t | y_1 ... y_(t-1), photo) for t = 1, 2, ..., where y is a reference."""
    losses = []
    for batch in split_batches(range(len(split)), batch_size):
        words, targets, photo = split.pack(batch)
        grid = reader.read(reader.rows_of([split.ids[index] for index in batch])).to(captioner.device, torch.float32)
        logits = captioner.decoder(grid, words, photo).logits
        losses.append(F.cross_entropy(logits, targets, reduction="none").split(words.batch_sizes.tolist()))
    by_position = zip_longest(*losses, fillvalue=torch.empty(0))  # the parts of all batches
    return [torch.cat(parts).mean().item() for parts in by_position]


@torch.no_grad()
def main(bench: Bench) -> None:
    photos = photos_in_split(list(read_captions(bench.data)), bench.split, bench.data)
    reader = FeatureReader(bench.features or bench.data / "features.h5")
    for run in bench.runs:
        captioner = Captioner.load(run, device="cpu", precision="float32")
        means = [
            mean(
                continuation_cider(captioner, reader, photos, words, index, bench.batch_size)
                for index in range(bench.captions)
            )
            for words in range(bench.words + 1)
        ]
        split = CaptionDataset(photos, captioner.vocabulary, MAX_LENGTH)
        losses = loss_by_position(captioner, reader, split, bench.batch_size)[: 2 * bench.words]
        print(
            f"{run}: CIDEr-D after 0 to {bench.words} reference words: {', '.join(f'{value:.1f}' for value in means)}"
        )
        print(f"    loss of words 1 to {len(losses)}: {', '.join(f'{value:.2f}' for value in losses)}")


if __name__ == "__main__":
    main(tyro.cli(Bench))
