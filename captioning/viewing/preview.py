"""Previews of a few fixed validation photos, drawn every epoch: the caption and its attention.

The images are files of the run, RUN/pictures/epoch-03-0.png; log.jsonl names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from captioning.dataset.caption_dataset import CaptionDataset
from captioning.encoders.grid import GRID_SIZE
from captioning.encoders.images import open_photo
from captioning.errors import PhotoError
from captioning.runtime.progress import tqdm
from captioning.viewing.attention_plots import CaptionedImage, draw_card

SIZE = 256  # pixels of the longer side in memory: more than a card shows
PreviewCaptions = dict[str, tuple[list[str], np.ndarray | None]]  # photo id -> words, attention (T, 196)


class Preview:
    """The first `count` photos of a split.

    A preview that cannot be drawn does not stop training: the reason is printed once, and no more are drawn.
    """

    def __init__(self, split: CaptionDataset, count: int, folder: Path):
        self.ids = list(islice(split.ids, count))
        self.paths = dict(zip(self.ids, split.paths, strict=False))
        self.folder = folder
        self.photos: dict[str, Image.Image] = {}  # read when first drawn
        self.enabled = True

    def draw(
        self,
        epoch: int,
        captions: PreviewCaptions,
        references: Mapping[str, Sequence[Sequence[str]]],
        join_words: Callable[[Sequence[str]], str],
    ) -> list[dict]:
        """Draw the captions of an epoch and return one log entry per photo.

        An entry has the id, caption, references, and the picture's path in the run's folder (None if not drawn).
        captions: photos without one are left out. references: photo id -> captions in words. join_words: words -> text.
        """
        entries = []
        ids = [id for id in self.ids if id in captions]
        for index, id in enumerate(ids):
            words, attention = captions[id]
            picture = Path("pictures") / f"epoch-{epoch:02}-{index}.png"
            caption = join_words(words)
            drawn = self.enabled and self._draw(id, caption, words, attention, self.folder / picture)
            entries.append(
                {
                    "id": id,
                    "caption": caption,
                    "references": [join_words(reference) for reference in references[id]],
                    "picture": str(picture) if drawn else None,
                }
            )
        return entries

    def _draw(self, id: str, caption: str, words: list[str], attention: np.ndarray | None, path: Path) -> bool:
        """Draw one card and return True; if that fails, print the reason, disable previews and return False."""
        try:
            draw_card(CaptionedImage(self._load_photo(id), caption, words, attention, (GRID_SIZE, GRID_SIZE)), path)
        except (PhotoError, LookupError, OSError) as error:
            tqdm.write(f"previews are disabled: {error}")
            self.enabled = False
        return self.enabled

    def _load_photo(self, id: str) -> Image.Image:
        if id not in self.photos:
            photo = open_photo(self.paths[id])
            photo.thumbnail((SIZE, SIZE))
            self.photos[id] = photo
        return self.photos[id]
