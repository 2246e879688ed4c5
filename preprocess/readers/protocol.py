"""The protocol of an annotation reader. To support another format, write a class like this one and register it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from preprocess.annotations import Record


class AnnotationReader(Protocol):
    """Reads one format of annotation file.

    To add a format, write a class with these members in a file of preprocess/readers/ and register it in
    preprocess.ANNOTATION_READERS (preprocess/__init__.py). The files given to --train, --val, --test, --karpathy and
    --references are then tried with it, in the order of registration. preprocess/readers/checks.py has what every
    reader needs: `read_field` checks the type of a field, and `make_record` checks paths and captions.

    description: the name of the format in error messages.
    has_splits: whether the file names a split for every photo. Such a file is given to --karpathy, others to --train.
    """

    description: str
    has_splits: bool

    def recognises(self, data: object) -> bool:
        """Whether parsed JSON has this format. Called with every kind of JSON value; never raises."""
        ...

    def read(self, path: Path, data: Any, images: str, split: str) -> Iterator[Record]:
        """Yield the records in the order of the file.

        path: the file, for error messages. data: its parsed JSON, which `recognises` has accepted. images: the image
        folder, which precedes each record's path; may be "". split: the split of all records; ignored where
        `has_splits`.
        Raises UserError for an entry with a missing field, an unsafe path or no captions.
        """
        ...
