"""One file a decoder, one protocol. A new decoder is a new file and a line here."""

from __future__ import annotations

import inspect

from torch import nn

from captioning.decoders.adaptive import AdaptiveDecoder
from captioning.decoders.attention import AttentionDecoder
from captioning.decoders.lstm import LstmDecoder
from config import UserError

DECODERS = {"lstm": LstmDecoder, "attention": AttentionDecoder, "adaptive": AdaptiveDecoder}


def build_decoder(name: str, sizes: dict) -> nn.Module:
    """The decoder of this name; of `sizes` it takes those that its constructor names."""
    decoder = DECODERS[name]
    wanted = inspect.signature(decoder).parameters
    return decoder(**{size: value for size, value in sizes.items() if size in wanted})


def load_decoder(decoder: nn.Module, saved: dict, name: str, sizes: dict, source: str) -> None:
    """Put the weights of a checkpoint's `decoder` into this one.

    Raises UserError where the two differ, naming what differs.
    """
    if saved["name"] != name:
        raise UserError(f"{source}: holds the decoder {saved['name']}, not {name}; give --decoder {saved['name']}")
    for size, value in sizes.items():
        if saved["sizes"][size] != value and size != "dropout":
            raise UserError(f"{source}: has {size} {saved['sizes'][size]}, not {value}; the two must be equal")
    decoder.load_state_dict(saved["state"])
