"""Decoders made from settings, and filled from checkpoints."""

from __future__ import annotations

import inspect

from torch import nn

from captioning.decoders import DECODERS
from captioning.errors import UserError


def decoder_arguments(name: str, settings: dict) -> dict:
    """Those of the settings that the constructor of this decoder takes."""
    parameters = inspect.signature(DECODERS[name]).parameters
    return {argument: value for argument, value in settings.items() if argument in parameters}


def build_decoder(name: str, settings: dict) -> nn.Module:
    """The decoder of this name with random weights. Settings that its constructor does not take are ignored."""
    return DECODERS[name](**decoder_arguments(name, settings))


def load_decoder(decoder: nn.Module, saved: dict, name: str, arguments: dict, source: str) -> None:
    """Load the weights of a checkpoint's `decoder` into this one.

    Raises UserError, naming the difference, where the checkpoint holds another decoder or other sizes.
    """
    if saved["name"] != name:
        raise UserError(f"{source}: holds the decoder {saved['name']}, not {name}; give --decoder {saved['name']}")
    for argument, value in arguments.items():
        found = saved["sizes"].get(argument, value)
        if found != value and argument != "dropout":
            raise UserError(f"{source}: has {argument} {found}, not {value}; the two must be equal")
    decoder.load_state_dict(saved["state"])
