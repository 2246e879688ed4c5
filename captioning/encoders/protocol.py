"""The protocol of an encoder family, such as torchvision's classifiers.

To add a family, write a class that inherits EncoderFamily, with the methods `build` and `published_weights`, and
register it in captioning/encoders/__init__.py. Its networks are then available as `--encoder FAMILY/NAME`.

Letters: B photos, S pixels per side, C channels, h x w native cells.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from captioning.encoders import DEFAULT_FAMILY, ENCODER_FAMILIES
from captioning.encoders.images import Transform
from captioning.errors import UserError

BODY_PREFIX = "network."  # of parameter names in a body that wraps a library's network; users never see it


class BodyOptions(NamedTuple):
    """How a family builds a network, beside its name."""

    image_size: int  # S, pixels
    class_vector: bool = False  # also return one vector per photo: its class token, or what attention pooling returns
    drop_path: float = 0.0  # probability that training skips the last residual branch of a photo; less in earlier ones


class EncoderFamily(Protocol):
    """Builds bodies (networks without their classifier) by name, and finds the weights that were published for them."""

    published: str = "imagenet"  # the family's published weights, in --weights and in recipes

    def full_name(self, name: str) -> str:
        """The name that recipes record. Raises UserError if the family has no such network."""
        return name

    def transform(self, name: str) -> Transform:
        """How photos must be prepared for the published weights of a network."""
        return Transform()

    def licence(self, name: str) -> str:
        """What is known of the licence of a network's published weights, for model cards; "" if nothing is."""
        return ""

    def build(self, name: str, options: BodyOptions) -> nn.Module:
        """Build the network without its classification head, with random weights from torch's global generator.

        The body maps normalised photos (B, 3, S, S) float32 to a feature map (B, C, h, w); with
        `options.class_vector` to that map and vectors (B, C). It holds no parameters that these do not depend on.
        It may have two further methods: `checkpoint_activations()`, without which it must be a torch.fx.GraphModule
        for --checkpoint-activations, and `layer_depths()`, which --layer-decay requires: the depth of each parameter,
        by its name, 0 for those next to the photo.

        Raises UserError if the family has no such network, or if it cannot do what the options ask for.
        """
        ...

    def published_weights(self, name: str, options: BodyOptions) -> dict[str, Tensor]:
        """The state dict of the network's published weights, in any form that `convert` understands.

        Raises UserError if the weights are neither cached nor can be downloaded.
        """
        ...

    def convert(self, state: dict[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
        """Rename the entries of a state dict of this network to the body's, from whatever version of the network.

        Entries beyond the body's, such as a classifier's, are ignored.
        """
        return state

    def unexpected(self, names: Iterable[str], body: nn.Module) -> list[str]:
        """Those names of entries beyond the body's that show the weights to be of another network."""
        return []


def find_family(encoder: str) -> tuple[EncoderFamily, str]:
    """Split an encoder's name into its family and the name within it.

    "resnet18" -> torchvision's family, "resnet18"; "FAMILY/NAME" -> that family, "NAME".
    Raises UserError for an unknown family.
    """
    prefix, slash, name = encoder.partition("/")
    if not slash:
        return ENCODER_FAMILIES[DEFAULT_FAMILY](), encoder
    return ENCODER_FAMILIES[prefix](), name


def full_name(encoder: str) -> str:
    """The name of an encoder as recipes record it: with its family, unless that is torchvision's."""
    family, name = find_family(encoder)
    prefix, slash, _ = encoder.partition("/")
    name = family.full_name(name)
    return f"{prefix}/{name}" if slash and prefix != DEFAULT_FAMILY else name


def default_transform(encoder: str, image_size: int | None) -> Transform:
    """The transform of an encoder's published weights. image_size: replaces its size, unless it is None."""
    family, name = find_family(encoder)
    transform = family.transform(name)
    return transform if image_size is None else replace(transform, image_size=image_size)


def suggest(name: str, known: Iterable[str], prefix: str, otherwise: str) -> str:
    """The end of a sentence about an unknown name: the most similar known names, with a prefix, or else `otherwise`."""
    nearest = difflib.get_close_matches(name, list(known), 3, 0.6)
    return f"did you mean {' or '.join(prefix + other for other in nearest)}?" if nearest else otherwise


def no_class_vector(encoder: str) -> UserError:
    """The error of an encoder that cannot return `class_vector`."""
    return UserError(
        f"--pooled class: {encoder} has no class token or attention pooling of its cells' size; leave it out"
    )
