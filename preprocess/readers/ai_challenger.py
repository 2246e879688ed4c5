"""AI Challenger: [{"image_id": "8f00.jpg", "caption": ["...", ...]}, ...]"""

from __future__ import annotations

from collections.abc import Iterator

from preprocess.annotations import Entry
from preprocess.content import Content
from preprocess.readers.checks import as_dict, first_has_key, no_captions


class AiChallengerReader:
    """Reads the caption files of the AI Challenger 2017 competition (Wu et al., 2017, https://arxiv.org/abs/1711.06475).

    `caption` may also be one text, as in the challenge's submissions; several entries of a photo then add up.
    """

    description = "AI Challenger"

    def recognises(self, content: Content) -> bool:
        """Whether a content has this form: see AnnotationReader."""
        return first_has_key(content.data, "image_id")

    def read(self, content: Content) -> Iterator[Entry]:
        """Yield the entries: see AnnotationReader. Raises UserError for a list of photos to caption."""
        entries = [as_dict(entry) for entry in content.data]  # type: ignore[attr-defined]
        if not any("caption" in entry for entry in entries):
            raise no_captions(content.path)
        for index, entry in enumerate(entries):
            caption = entry.get("caption")
            where = f"{content.path}: entry {index}"
            yield Entry(where, entry.get("image_id"), caption, may_repeat=isinstance(caption, str))
