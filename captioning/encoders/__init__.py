"""Photo -> Grid: decoding, the transform, and the encoder families. A new family is one file and one entry here."""

from __future__ import annotations

from captioning.runtime.registry import Registry

DEFAULT_FAMILY = "torchvision"

# prefix of --encoder -> family class (encoders/protocol.py): "FAMILY/NAME"; a plain NAME is torchvision's
ENCODER_FAMILIES = Registry(
    "--encoder: family",
    {
        "torchvision": "captioning.encoders.torchvision_backbone:TorchvisionFamily",
        "timm": "captioning.encoders.timm_backbone:TimmFamily",
    },
)
