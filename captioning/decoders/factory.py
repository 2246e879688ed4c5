"""Create decoders from settings, and load their weights from checkpoints."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from captioning.decoders import DECODERS
from captioning.errors import UserError


def decoder_arguments(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the constructor of the decoder `name` takes; its default for those that are None."""
    parameters = inspect.signature(DECODERS[name]).parameters
    taken = {argument: value for argument, value in settings.items() if argument in parameters}
    return {argument: parameters[argument].default if value is None else value for argument, value in taken.items()}


def build_decoder(name: str, settings: dict[str, Any]) -> nn.Module:
    """Create the decoder `name` with random weights. Settings that its constructor does not take are ignored.

    Raises UserError for a name that is not in DECODERS.
    """
    return DECODERS[name](**decoder_arguments(name, settings))


def load_decoder(
    decoder: nn.Module, checkpoint: dict[str, Any], name: str, arguments: dict[str, Any], source: str
) -> None:
    """Load the weights of a checkpoint into `decoder`, which was created as `name` with `arguments`.

    checkpoint: the entry "decoder" of a checkpoint file, with the keys "name", "sizes" and "state".
    source: names the checkpoint in error messages.
    Raises UserError, naming the difference, if the checkpoint holds another decoder or other sizes.
    """
    found_name = checkpoint["name"]
    if found_name != name:
        raise UserError(f"{source}: holds the decoder {found_name}, not {name}; give --decoder {found_name}")
    defaults = decoder_arguments(name, dict.fromkeys(arguments))
    sizes = defaults | checkpoint["sizes"]  # an older checkpoint lacks the arguments that came later
    for argument, value in arguments.items():
        found = sizes[argument]
        if found != value and argument != "dropout":
            raise UserError(f"{source}: has {argument} {found}, not {value}; the two must be equal")
    decoder.load_state_dict(checkpoint["state"])
