"""AI Challenger: [{"image_id": "8f00.jpg", "caption": ["...", ...]}, ...]"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from preprocess.annotations import Record
from preprocess.readers.checks import first_has_key, make_record, read_field


class AiChallengerReader:
    """Reads the caption files of the AI Challenger 2017 competition (Wu et al., 2017, https://arxiv.org/abs/1711.06475)."""

    description = "AI Challenger"
    has_splits = False

    def recognises(self, data: object) -> bool:
        """Whether parsed JSON has this format: see AnnotationReader."""
        return first_has_key(data, "image_id") and first_has_key(data, "caption")

    def read(self, path: Path, data: list, images: str, split: str) -> Iterator[Record]:
        """Yield the records: see AnnotationReader."""
        for index, entry in enumerate(data):
            location = f"{path}: entry {index}"
            name = read_field(location, entry, "image_id", str)
            captions = read_field(location, entry, "caption", list)
            yield make_record(location, images, name, name, split, captions)
