"""How good captions are whose first words are true: is a decoder better at beginning, or at going on?

    python bench/beginnings.py data/f8k-zh checkpoints/zh-attention checkpoints/zh-adaptive

The first n words of one of a photo's captions are given and the rest is written greedily; CIDEr-D is against its other
captions, the mean over the first --captions of each photo. What the given words alone are worth is the same for all.
Below, the cross entropy of the true words by their place in the caption, all words before them given.

Letters: B photos, n given words, V vocabulary.
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
from captioning.encoders.images import in_batches
from captioning.evaluation.metrics import score
from captioning.features.feature_cache import FeatureReader
from preprocess.captions import Photo, read_captions
from preprocess.vocabulary import END, PAD, START, UNKNOWN

LONGEST = 20  # words a caption


@dataclass(frozen=True)
class Bench:
    data: Positional[Path]
    runs: Positional[tuple[Path, ...]]  # folders of checkpoints/
    features: Path | None = None  # the data's own
    split: str = "val"
    words: int = 4  # given at most
    captions: int = 3  # of a photo, whose first words are given
    batch_size: int = 100  # photos


def go_on(decoder: Decoder, grid: Grid, given: Tensor) -> Tensor:
    """given (B, n) int64, PAD behind an <end> -> what is written greedily, the given words too (B, LONGEST)."""
    state, words, written = decoder.init_state(grid), torch.full((len(grid),), START), []
    for step in range(LONGEST):
        log_probabilities, _, state, _ = decoder.step(words, state)
        log_probabilities[:, [PAD, UNKNOWN, START]] = -torch.inf  # words that are never written
        words = given[:, step] if step < given.shape[1] else log_probabilities.argmax(1)
        written.append(words)
    return torch.stack(written, 1)


def cider_after(
    captioner: Captioner, reader: FeatureReader, photos: list[Photo], words: int, which: int, batch_size: int
) -> float:
    """CIDEr-D of captions that begin with so many words of each photo's caption number `which`."""
    said, references = {}, {}
    for some in in_batches(photos, batch_size):
        true = [photo.captions[which % len(photo.captions)] for photo in some]
        given = torch.full((len(some), words), PAD)
        for row, caption in zip(given, true, strict=True):
            begun = [*captioner.vocabulary.encode(caption), END][:words]
            row[: len(begun)] = torch.tensor(begun)
        grid = reader.read(reader.rows_of([photo.id for photo in some])).to(captioner.device, torch.float32)
        for photo, caption, row in zip(some, true, go_on(captioner.decoder, grid, given).tolist(), strict=True):
            row = row[: row.index(END)] if END in row else row
            said[photo.id] = [*caption[:words], *captioner.vocabulary.decode(row[words:])]  # as people spell them
            references[photo.id] = [other for other in photo.captions if other is not caption] or [caption]
    return score(said, references)["CIDEr-D"]


def loss_by_place(captioner: Captioner, reader: FeatureReader, split: CaptionDataset, batch_size: int) -> list[float]:
    """The mean of -log p(y_t | the true words before it, the photo) for t = 1, 2, ..."""
    losses = []
    for some in in_batches(range(len(split)), batch_size):
        words, targets, photo = split.pack(some)
        grid = reader.read(reader.rows_of([split.ids[place] for place in some])).to(captioner.device, torch.float32)
        scores = captioner.decoder(grid, words, photo).logits
        losses.append(F.cross_entropy(scores, targets, reduction="none").split(words.batch_sizes.tolist()))
    return [torch.cat([part for part in at_once if part is not None]).mean().item() for at_once in zip_longest(*losses)]


@torch.no_grad()
def main(bench: Bench) -> None:
    photos = photos_in_split(list(read_captions(bench.data)), bench.split, bench.data)
    reader = FeatureReader(bench.features or bench.data / "features.h5")
    for run in bench.runs:
        captioner = Captioner.load(run, device="cpu", precision="float32")
        means = [
            mean(
                cider_after(captioner, reader, photos, words, which, bench.batch_size)
                for which in range(bench.captions)
            )
            for words in range(bench.words + 1)
        ]
        split = CaptionDataset(photos, captioner.vocabulary, LONGEST)
        losses = loss_by_place(captioner, reader, split, bench.batch_size)[: 2 * bench.words]
        print(f"{run}: CIDEr-D after 0 to {bench.words} true words: {', '.join(f'{one:.1f}' for one in means)}")
        print(f"    loss of words 1 to {len(losses)}: {', '.join(f'{one:.2f}' for one in losses)}")


if __name__ == "__main__":
    main(tyro.cli(Bench))
