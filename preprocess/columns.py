"""The columns of photo, caption and split in a table, or the keys of JSON rows."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_COLUMNS = (
    "image",
    "file_name",
    "filename",
    "filepath",
    "image_name",
    "image_path",
    "file",
    "path",
    "photo",
    "img",
)
CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "title", "sentence", "sentences", "comment", "raw")
SPLIT_COLUMNS = ("split", "subset", "set")


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a table, or keys of JSON rows, of photo and caption: given, or else found by their names."""

    image: str | None = None
    caption: str | None = None

    def find(self, names: list[str]) -> tuple[str, str, str | None] | None:
        """The columns of photo, caption and split (None: there is none) among `names`; None without the first two."""
        image = _first(names, (self.image,) if self.image else IMAGE_COLUMNS)
        caption = self.find_caption(names)
        if image is None or caption is None:
            return None
        return image, caption, _first(names, SPLIT_COLUMNS)

    def find_caption(self, names: list[str]) -> str | None:
        """The column of the caption among `names`."""
        return _first(names, (self.caption,) if self.caption else CAPTION_COLUMNS)


def _first(names: list[str], wanted: tuple[str, ...]) -> str | None:
    """The name that is first in `wanted`, in any case of letters."""
    by_lower_case = {name.strip().lower(): name for name in reversed(names) if isinstance(name, str)}
    return next((by_lower_case[name.lower()] for name in wanted if name.lower() in by_lower_case), None)
