"""A mapping: {"1.jpg": ["a dog", "the dog"], "2.jpg": ["a cat"]}"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from preprocess.annotations import Entry
from preprocess.content import Content
from preprocess.folders import has_photo_ending
from preprocess.readers.checks import FIRST_ENTRIES


class MappingReader:
    """Reads an object whose keys are photos and whose values are their captions: a list, or one text."""

    description = "{photo: [captions]}"

    def recognises(self, content: Content) -> bool:
        """Whether a content has this form: see AnnotationReader. One key at least has to end like a photo."""
        if not isinstance(content.data, dict):
            return False
        first = list(islice(content.data.items(), FIRST_ENTRIES))
        lists = all(value is None or isinstance(value, (str, list)) for _, value in first)
        return lists and any(has_photo_ending(name) for name, _ in first)

    def read(self, content: Content) -> Iterator[Entry]:
        """Yield an entry for each photo: see AnnotationReader."""
        assert isinstance(content.data, dict)
        for name, captions in content.data.items():
            yield Entry(f"{content.path}: key {name[:60]!r}", name, captions)
