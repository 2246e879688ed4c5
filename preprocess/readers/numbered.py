"""Numbered captions: 1.jpg#0<TAB>a dog

Flickr8k.token.txt, results_20130124.token (Flickr30k), and the text files of Flickr8k-CN (1.jpg#zhc#0 ...) and COCO-CN,
which leaves out the photos' ending.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from preprocess.annotations import Entry, LeftOut
from preprocess.content import Content, Text

# name, #, perhaps the kind of caption and #, number, a tab or spaces, caption
LINE = re.compile(r"(?P<name>[^#\t]+)#(?:\w+#)?\d+(?:[\t ]+(?P<caption>.*))?")


class NumberedReader:
    """Reads lines of photo, # and number of the caption, and caption (Hodosh et al., 2013)."""

    description = "photo#0<TAB>caption"

    def recognises(self, content: Content) -> bool:
        """Whether a content has this form: see AnnotationReader. Most of the first lines have to look like it."""
        if not isinstance(content.data, Text):
            return False
        lines = content.data.first_lines()
        matches = [LINE.fullmatch(line) for line in lines]
        return 2 * sum(bool(match and match["caption"]) for match in matches) > len(lines)

    def read(self, content: Content) -> Iterator[Entry | LeftOut]:
        """Yield an entry for each line: see AnnotationReader."""
        assert isinstance(content.data, Text)
        for number, line in enumerate(content.data.lines, 1):
            if not line.strip():
                continue
            where = f"{content.path}: line {number}"
            match = LINE.fullmatch(line)
            if match is None:
                yield LeftOut(where, "a line without photo, # and number", "caption")
            else:
                yield Entry(where, match["name"].strip(), match["caption"], may_repeat=True)
