"""The sizes in the table of docs/encoders.md: cells, channels and gigabytes of a feature cache, for each encoder.

    python bench/encoder_sizes.py

Networks are built on torch's meta device: nothing is computed or downloaded. Sizes are those of --grid native, for COCO
(123,287 photos) and AI Challenger (240,000: 210,000 train and 30,000 val), in float16, and in uint8 with one float32
scale per cell; both hold one float32 vector per photo besides the cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import timm
import torch

from captioning.encoders.protocol import BodyOptions, default_transform, find_family, full_name
from captioning.features.hdf5_layout import data_bytes

PHOTOS = {"COCO": 123_287, "AI Challenger": 240_000}


class Row(NamedTuple):
    """An encoder of the table. size: --image-size, unless it is that of the weights; use: what it is good for."""

    encoder: str
    use: str
    size: int | None = None


ROWS = [
    Row("resnet101", "the published recipes of this project's papers; the default"),
    Row("timm/tf_efficientnet_lite2.in1k", "a CPU or a small disk"),
    Row("timm/convnext_base.fb_in22k_ft_in1k", "a strong CNN trained on classes"),
    Row("timm/convnext_base.clip_laion2b", "a CNN trained on captions, at any size"),
    Row("timm/swin_base_patch4_window12_384.ms_in22k_ft_in1k", "the grid features of many transformer captioners"),
    Row("timm/resnet50x4_clip.openai", "CLIP-ViL's grid features"),
    Row("timm/vit_base_patch16_clip_quickgelu_224.openai", "CLIP, exactly 14x14 cells; a first choice"),
    Row("timm/vit_large_patch14_clip_quickgelu_336.openai", "CLIP's largest, for scores"),
    Row("timm/vit_base_patch16_siglip_256.v2_webli", "SigLIP 2: many languages, also Chinese"),
    Row("timm/vit_so400m_patch14_siglip_384.webli", "SigLIP's largest, for scores"),
    Row("timm/vit_base_patch14_reg4_dinov2.lvd142m", "DINOv2: where things are, without text", 224),
    Row("timm/vit_base_patch16_dinov3.lvd1689m", "DINOv3: the same, newer"),
    Row("timm/eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", "EVA-02: fine cells"),
]


def shape(row: Row) -> tuple[int, int, int, int]:
    """(S, h, w, C): pixels per side, cells and channels."""
    size = default_transform(row.encoder, row.size).image_size
    family, name = find_family(full_name(row.encoder))
    with torch.device("meta"):
        body = family.build(name, BodyOptions(size))
        channels, height, width = body(torch.zeros(1, 3, size, size)).shape[1:]
    return size, height, width, channels


def gigabytes(shape: tuple[int, int, int, int], dtype: str) -> str:
    """GB (10^9 bytes) of the rows of a feature file, for features of this shape (photos, h, w, C)."""
    size = data_bytes(shape, np.dtype(dtype)) / 1e9
    return f"{size:,.0f}" if size >= 9.95 else f"{size:.1f}"


def licence(encoder: str) -> str:
    """What timm records of the weights; torchvision's are BSD."""
    if not encoder.startswith("timm/"):
        return "BSD-3-Clause"
    return timm.get_pretrained_cfg(encoder.removeprefix("timm/")).license or "not recorded"


def table(rows: Sequence[Row] = ROWS) -> str:
    """The table in Markdown."""
    headings = ["`--encoder`", "pixels", "cells", "channels", "COCO float16", "uint8", "AI Challenger float16", "uint8"]
    headings += ["licence", "good for"]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for row in rows:
        size, height, width, channels = shape(row)
        flag = f"`{row.encoder}`" + (f" `--image-size {row.size}`" if row.size else "")
        sizes = [
            gigabytes((photos, height, width, channels), dtype)
            for photos in PHOTOS.values()
            for dtype in ("float16", "uint8")
        ]
        columns = [flag, str(size), f"{height}x{width}", f"{channels:,}", *sizes, licence(row.encoder), row.use]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
