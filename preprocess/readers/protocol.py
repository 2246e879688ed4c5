"""The protocol of an annotation reader. To support another form, write a class like this one and register it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from preprocess.annotations import Entry, LeftOut
from preprocess.content import Content


class AnnotationReader(Protocol):
    """Reads one form of annotation file.

    To add a form, write a class with these members in a file of preprocess/readers/ and register it in
    preprocess.ANNOTATION_READERS (preprocess/__init__.py). The files given to --source, --train, --val, --test,
    --karpathy and --references are then tried with it, in the order of registration.

    description: the name of the form in error messages.
    """

    description: str

    def recognises(self, content: Content) -> bool:
        """Whether the content has this form. Called with every kind of JSON value and text; never raises."""
        ...

    def read(self, content: Content) -> Iterator[Entry | LeftOut]:
        """Yield what the file has, in its order: unchecked, since preprocess.annotations checks all entries alike.

        content: what `recognises` has accepted. A reader yields LeftOut for what only it can judge, such as a row
        without a column. Raises UserError only for a file that is of no use as a whole.
        """
        ...
