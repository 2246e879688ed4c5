"""COCO: {"images": [{"id": 9, "file_name": "9.jpg"}], "annotations": [{"image_id": 9, "caption": "..."}]}"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from captioning.errors import UserError
from preprocess.annotations import Record
from preprocess.readers.checks import make_record, read_field


class CocoReader:
    """Reads the captions_*.json files of COCO (Chen et al., 2015, https://arxiv.org/abs/1504.00325)."""

    description = "COCO captions"
    has_splits = False

    def recognises(self, data: object) -> bool:
        """Whether parsed JSON has this format: see AnnotationReader."""
        if not isinstance(data, dict):
            return False
        return isinstance(data.get("images"), list) and isinstance(data.get("annotations"), list)

    def read(self, path: Path, data: dict, images: str, split: str) -> Iterator[Record]:
        """Yield the records: see AnnotationReader."""
        captions = _captions_by_image(path, data)
        for index, entry in enumerate(data["images"]):
            location = f"{path}: image {index}"
            name = read_field(location, entry, "file_name", str)
            yield make_record(location, images, name, str(entry["id"]), split, captions[entry["id"]])


def _captions_by_image(path: Path, data: dict) -> dict[int, list[object]]:
    """Image id -> its captions, in the order of the annotations; an image without annotations has none."""
    captions: dict[int, list[object]] = {}
    for index, entry in enumerate(data["images"]):
        captions[read_field(f"{path}: image {index}", entry, "id", int)] = []
    for index, entry in enumerate(data["annotations"]):
        location = f"{path}: annotation {index}"
        if isinstance(entry, dict) and "caption" not in entry:
            raise UserError(f"{location} has no caption; give captions_*.json, not instances_*.json")
        image = read_field(location, entry, "image_id", int)
        if image not in captions:
            raise UserError(f"{location} belongs to image {image}, which 'images' does not list; add or remove it")
        captions[image].append(entry["caption"])
    return captions
