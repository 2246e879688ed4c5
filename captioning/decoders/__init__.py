"""Caption decoders. Each is one file that follows captioning/decoders/protocol.py, and one entry of DECODERS."""

from __future__ import annotations

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
    },
)
