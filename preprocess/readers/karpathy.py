"""Karpathy: {"images": [{"filename": "9.jpg", "split": "train", "sentences": [{"raw": "..."}]}]}"""

from __future__ import annotations

import os
from collections.abc import Iterator

from preprocess.annotations import Entry, LeftOut
from preprocess.content import Content
from preprocess.readers.checks import as_dict, first_has_key


class KarpathyReader:
    """Reads the dataset_*.json files of the Karpathy splits (Karpathy and Fei-Fei, 2015, https://arxiv.org/abs/1412.2306)."""

    description = "Karpathy"

    def recognises(self, content: Content) -> bool:
        """Whether a content has this form: see AnnotationReader."""
        return isinstance(content.data, dict) and first_has_key(content.data.get("images"), "sentences")

    def read(self, content: Content) -> Iterator[Entry | LeftOut]:
        """Yield the entries: see AnnotationReader."""
        assert isinstance(content.data, dict)
        for index, entry in enumerate(map(as_dict, content.data["images"])):
            where = f"{content.path}: image {index}"
            name, folder, sentences = entry.get("filename"), entry.get("filepath"), entry.get("sentences")
            if entry.get("split") is None:
                yield LeftOut(where, "no 'split'", "photo")
                continue
            file = os.path.join(folder, name) if name and isinstance(name, str) and isinstance(folder, str) else name
            captions = [_sentence_text(sentence) for sentence in sentences] if isinstance(sentences, list) else None
            id = name if entry.get("cocoid") is None else entry["cocoid"]
            yield Entry(where, file, captions, id=id, split=entry["split"])


def _sentence_text(sentence: object) -> object:
    """The sentence as it was written, or else its tokens joined by spaces; None where it has neither."""
    if isinstance(sentence, dict) and isinstance(sentence.get("raw"), str):
        return sentence["raw"]
    if isinstance(sentence, dict) and isinstance(sentence.get("tokens"), list):
        return " ".join(str(token) for token in sentence["tokens"] if isinstance(token, (str, int, float)))
    return None
