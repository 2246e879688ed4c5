"""The protocol of an encoder family, such as torchvision's classifiers.

To add a family, write a class with these two methods and register it in captioning/encoders/__init__.py. Its networks
are then available as `--encoder FAMILY/NAME`.

Letters: B photos, S pixels per side, C channels, h x w native cells.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from captioning.encoders import DEFAULT_FAMILY, ENCODER_FAMILIES


class EncoderFamily(Protocol):
    """Builds CNN bodies by name and finds their published ImageNet weights."""

    def build(self, name: str) -> nn.Module:
        """Build the network without its classification head, with random weights from torch's global generator.

        The body maps normalised photos (B, 3, S, S) float32 to a feature map (B, C, h, w). It holds no parameters
        that the map does not depend on, and its state-dict keys are those of the published weights.
        --checkpoint-activations requires a torch.fx.GraphModule; everything else accepts any module.

        Raises UserError if the family has no such network, or if it has no spatial feature map.
        """
        ...

    def imagenet_weights(self, name: str) -> dict[str, Tensor]:
        """The state dict of the network's published ImageNet weights; entries beyond the body's are ignored.

        Raises UserError if the weights are neither cached nor can be downloaded.
        """
        ...


def find_family(encoder: str) -> tuple[EncoderFamily, str]:
    """Split an encoder's name into its family and the name within it.

    "resnet18" -> torchvision's family, "resnet18"; "FAMILY/NAME" -> that family, "NAME".
    Raises UserError for an unknown family.
    """
    prefix, slash, name = encoder.partition("/")
    if not slash:
        return ENCODER_FAMILIES[DEFAULT_FAMILY](), encoder
    return ENCODER_FAMILIES[prefix](), name
