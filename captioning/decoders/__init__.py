"""Caption decoders: one file each, one protocol (decoders/protocol.py). A new decoder is a file and an entry here."""

from __future__ import annotations

from captioning.runtime.registry import Registry

# name -> decoder class; its constructor names the settings it takes
DECODERS = Registry(
    "--decoder",
    {
        "lstm": "captioning.decoders.lstm:LstmDecoder",
        "attention": "captioning.decoders.attention:AttentionDecoder",
        "hard-attention": "captioning.decoders.hard_attention:HardAttentionDecoder",
        "adaptive": "captioning.decoders.adaptive:AdaptiveDecoder",
    },
)
