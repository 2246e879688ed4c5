"""What a feature file records of how its rows were made, and in what two files differ."""

from __future__ import annotations

from captioning.encoders.images import PILLOW
from captioning.features.hdf5_layout import FORMAT, ContiguousArray

# Absent from files that older versions created
LATER_ATTRIBUTES = {
    "scaled_decoding": False,
    "nvjpeg": False,
    "decoding": PILLOW,
    "interpolation": "bilinear",
    "pooled": "mean",
    "view": "whole",
}


def describe_features(
    recipe: dict, native_grid: tuple[int, int], grid: str, precision: str, view: str = "whole"
) -> dict:
    """The attributes of a feature file.

    recipe: Encoder.recipe(); grid: "14" or "native"; precision: a torch dtype; view: the name of a View.
    """
    transform = recipe["transform"]
    return {
        "format": FORMAT,
        "encoder": recipe["name"],
        "weights": recipe["weights"],
        "image_size": transform["image_size"],
        "mean": list(transform["mean"]),
        "std": list(transform["std"]),
        "grid": grid,
        "native_grid": list(native_grid),
        "precision": precision,
        "scaled_decoding": transform.get("scaled_decoding", False),
        "nvjpeg": transform.get("nvjpeg", False),
        "decoding": transform.get("decoding", PILLOW),
        "interpolation": transform.get("interpolation", "bilinear"),
        "pooled": recipe.get("pooled", "mean"),
        "view": view,
        "weights_sha256": recipe["sha256"],  # compared last: that of random weights depends on all settings above
    }


def complete_attributes(attributes: dict, features: ContiguousArray) -> dict:
    """The attributes of a file, with those that an older file lacks, and the dtype and shape (h, w, C) of its rows."""
    rows = {"dtype": str(features.dtype), "shape": [*features.shape[1:]]}
    return {**LATER_ATTRIBUTES, **attributes, **rows}


def first_difference(found: dict, expected: dict) -> str | None:
    """The name of the first of the expected attributes that is absent or has another value; None if there is none.

    The same weights may lie elsewhere, as on another machine that extracts a part.
    """
    digest = found.get("weights_sha256")
    if digest is not None and digest == expected.get("weights_sha256"):
        expected = {name: value for name, value in expected.items() if name != "weights"}
    return next((name for name, value in expected.items() if found.get(name) != value), None)
