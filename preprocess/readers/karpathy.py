"""Karpathy: {"images": [{"filename": "9.jpg", "split": "train", "sentences": [{"raw": "..."}]}]}"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from captioning.errors import UserError
from preprocess.annotations import SPLITS, Record
from preprocess.readers.checks import first_has_key, make_record, read_field


class KarpathyReader:
    """Reads the dataset_*.json files of the Karpathy splits (Karpathy and Fei-Fei, 2015, https://arxiv.org/abs/1412.2306).

    The split restval holds the photos of COCO's val2014 that are in neither val nor test. As in most published work, it
    is part of train.
    """

    description = "Karpathy"
    has_splits = True

    def recognises(self, data: object) -> bool:
        """Whether parsed JSON has this format: see AnnotationReader."""
        return isinstance(data, dict) and first_has_key(data.get("images"), "sentences")

    def read(self, path: Path, data: dict, images: str, split: str) -> Iterator[Record]:
        """Yield the records: see AnnotationReader."""
        for index, entry in enumerate(data["images"]):
            yield _read_entry(f"{path}: image {index}", entry, images)


def _read_entry(location: str, entry: dict, images: str) -> Record:
    name = read_field(location, entry, "filename", str)
    sentences = read_field(location, entry, "sentences", list)
    split = read_field(location, entry, "split", str)
    if split == "restval":
        split = "train"
    if split not in SPLITS:
        raise UserError(f"{location} ({name!r}): split {split!r}; it must be train, restval, val or test")
    file = os.path.join(str(entry.get("filepath", "")), name)
    captions = [_sentence_text(location, sentence) for sentence in sentences]
    return make_record(location, images, file, str(entry.get("cocoid", name)), split, captions)


def _sentence_text(location: str, sentence: object) -> str:
    """The sentence as it was written, or else its tokens joined by spaces."""
    if isinstance(sentence, dict) and isinstance(sentence.get("raw"), str):
        return sentence["raw"]
    if isinstance(sentence, dict) and isinstance(sentence.get("tokens"), list):
        return " ".join(map(str, sentence["tokens"]))
    raise UserError(f"{location}: a sentence has neither 'raw' text nor 'tokens'; correct or remove it")
