"""COCO: {"images": [{"id": 9, "file_name": "9.jpg"}], "annotations": [{"image_id": 9, "caption": "..."}]}

STAIR Captions, nocaps and VizWiz have the same form.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

from captioning.errors import UserError
from preprocess.annotations import Entry, LeftOut
from preprocess.content import Content
from preprocess.readers.checks import as_dict, first_has_key, no_captions

# VizWiz (Gurari et al., 2020, https://arxiv.org/abs/2002.08565) marks captions that its makers rejected, and those with
# the words that annotators chose for a photo of too low quality.
MARKS = {"is_rejected": "a caption that its makers rejected", "is_precanned": "a canned caption: the photo is unclear"}


class CocoReader:
    """Reads the captions_*.json files of COCO (Chen et al., 2015, https://arxiv.org/abs/1504.00325)."""

    description = "COCO captions"

    def recognises(self, content: Content) -> bool:
        """Whether a content has this form: see AnnotationReader."""
        data = content.data
        if not isinstance(data, dict) or not isinstance(data.get("images"), list):
            return False
        if isinstance(data.get("annotations"), list):
            return True
        return "annotations" not in data and first_has_key(data["images"], "file_name")

    def read(self, content: Content) -> Iterator[Entry | LeftOut]:
        """Yield the entries: see AnnotationReader. Raises UserError for photos to caption and for instances_*.json."""
        path, data = content.path, content.data
        assert isinstance(data, dict)
        if "annotations" not in data:
            raise no_captions(path)
        captions: dict[object, list[object]] = {}
        for entry in data["images"]:
            captions[_key(as_dict(entry).get("id"))] = []
        marked = yield from _group_captions(path, data["annotations"], captions)
        for index, entry in enumerate(map(as_dict, data["images"])):
            where, id = f"{path}: image {index}", _key(entry.get("id"))
            if id is None:
                yield LeftOut(where, "no 'id'", "photo")
            elif id in marked and not captions[id]:
                yield LeftOut(
                    f"{where} ({str(entry.get('file_name'))!r})", "every caption is rejected or canned", "marked"
                )
            else:
                yield Entry(where, entry.get("file_name"), captions[id], id=id, split=entry.get("split"))


def _group_captions(
    path: Path, annotations: list, captions: dict[object, list[object]]
) -> Generator[LeftOut, None, set]:
    """Append each caption to those of its image. Returns the images with captions that their makers marked."""
    marked: set[object] = set()
    for index, entry in enumerate(annotations):
        where = f"{path}: annotation {index}"
        if isinstance(entry, dict) and "caption" not in entry and "bbox" in entry:
            raise UserError(f"{where} has no caption; give captions_*.json, not instances_*.json")
        entry = as_dict(entry)
        image = _key(entry.get("image_id"))
        mark = next((reason for key, reason in MARKS.items() if entry.get(key) is True), None)
        if image is None or image not in captions:
            yield LeftOut(where, f"belongs to image {(image or '')[:60]!r}, which 'images' does not list", "caption")
        elif mark:
            marked.add(image)
            yield LeftOut(f"{where} ({str(entry.get('caption'))[:60]!r})", mark, "marked")
        elif not isinstance(entry.get("caption"), str):
            yield LeftOut(where, "a caption that is null or not text", "caption")
        else:
            captions[image].append(entry["caption"])
    return marked


def _key(id: object) -> str | None:
    """An id that is text or an integer, as text: some exports mix both; None for anything else."""
    try:
        return str(id) if type(id) in (str, int) else None
    except ValueError:  # Python refuses to write integers of thousands of digits
        return None
