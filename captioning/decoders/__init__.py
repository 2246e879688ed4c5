"""One file a decoder, one protocol. A new decoder is a new file and a line here."""

from __future__ import annotations

import inspect

from torch import nn

from captioning.decoders.adaptive import AdaptiveDecoder
from captioning.decoders.attention import AttentionDecoder
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.decoders.lstm import LstmDecoder
from config import UserError

DECODERS = {
    "lstm": LstmDecoder, "attention": AttentionDecoder, "hard-attention": HardAttentionDecoder,
    "adaptive": AdaptiveDecoder,
}  # fmt: skip


def sizes_of(name: str, settings: dict) -> dict:
    """Of these settings those that the constructor of this decoder names."""
    wanted = inspect.signature(DECODERS[name]).parameters
    return {size: value for size, value in settings.items() if size in wanted}


def build_decoder(name: str, sizes: dict) -> nn.Module:
    return DECODERS[name](**sizes_of(name, sizes))


def load_decoder(decoder: nn.Module, saved: dict, name: str, sizes: dict, source: str) -> None:
    """Put the weights of a checkpoint's `decoder` into this one.

    Raises UserError where the two differ, naming what differs.
    """
    if saved["name"] != name:
        raise UserError(f"{source}: holds the decoder {saved['name']}, not {name}; give --decoder {saved['name']}")
    for size, value in sizes.items():
        there = saved["sizes"].get(size, value)
        if there != value and size != "dropout":
            raise UserError(f"{source}: has {size} {there}, not {value}; the two must be equal")
    decoder.load_state_dict(saved["state"])
