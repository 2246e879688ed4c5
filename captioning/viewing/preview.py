"""The same few validation photos, epoch after epoch: what the run says of them, and where it looks.

Their cards are files under the run, RUN/pictures/epoch-03-0.png; log.jsonl names them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from captioning.dataset.caption_dataset import CaptionDataset
from captioning.encoders.grid import SIDE
from captioning.encoders.images import open_photo
from captioning.errors import PhotoError
from captioning.viewing.attention_plots import Entry, draw_card

SIZE = 256  # pixels: larger than on a card
Watched = dict[str, tuple[list[str], np.ndarray | None]]  # photo's id -> words, attention (T, 196)


class Preview:
    """The first `count` photos of a split. What cannot be drawn is said once; training goes on without it."""

    def __init__(self, split: CaptionDataset, count: int, folder: Path):
        self.ids = [*islice(split.ids, count)]
        self.paths = dict(zip(self.ids, split.paths, strict=False))
        self.folder = folder
        self.photos: dict[str, Image.Image] = {}  # read when first drawn
        self.draws = True

    def draw(self, epoch: int, watched: Watched, references: dict, joined: Callable[[list[str]], str]) -> list[dict]:
        """The epoch's entries for the log: id, caption, references, and the picture's path in the run's folder.

        references: of each photo, captions in words; joined: makes words a text.
        """
        entries = []
        for place, photo in enumerate(photo for photo in self.ids if photo in watched):
            caption, picture = joined(watched[photo][0]), Path("pictures") / f"epoch-{epoch:02}-{place}.png"
            drawn = self._draw(photo, caption, *watched[photo], self.folder / picture)
            others = [joined(words) for words in references[photo]]
            entries.append(
                {"id": photo, "caption": caption, "references": others, "picture": str(picture) if drawn else None}
            )
        return entries

    def _draw(self, photo: str, caption: str, words: list[str], attention: np.ndarray | None, path: Path) -> bool:
        if not self.draws:
            return False
        try:
            if photo not in self.photos:
                self.photos[photo] = open_photo(self.paths[photo])
                self.photos[photo].thumbnail((SIZE, SIZE))
            draw_card(Entry(self.photos[photo], caption, words, attention, (SIDE, SIDE)), path)
        except (PhotoError, LookupError, OSError) as error:
            tqdm.write(f"no pictures of the captions: {error}")
            self.draws = False
        return self.draws
