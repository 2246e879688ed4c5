"""Caption decoders. Each is one file that follows captioning/decoders/protocol.py, and one entry of DECODERS."""

from __future__ import annotations

import inspect

from captioning.runtime.registry import Registry

# name -> decoder class. The constructor's parameter names select the settings that the class receives.
DECODERS = Registry(
    "--decoder",
    {
        "lstm": "captioning.decoders.lstm:LstmDecoder",
        "attention": "captioning.decoders.attention:AttentionDecoder",
        "hard-attention": "captioning.decoders.hard_attention:HardAttentionDecoder",
        "adaptive": "captioning.decoders.adaptive:AdaptiveDecoder",
        "transformer": "captioning.decoders.transformer:TransformerDecoder",
        "updown": "captioning.decoders.updown:UpDownDecoder",
        "xlan": "captioning.decoders.xlan:XlanDecoder",
        "aoa": "captioning.decoders.aoa:AoaDecoder",
    },
)


def decoders_with(setting: str) -> list[str]:
    """The decoders whose constructor takes this setting. Imports them all, and so torch."""
    return [name for name, decoder in DECODERS.items() if setting in inspect.signature(decoder).parameters]
