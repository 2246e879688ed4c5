"""A checkpoint made ready to caption photos: the Python interface.

from captioning.captioner import Captioner
captioner = Captioner.load("checkpoints/att")
print(captioner.caption(["photo.jpg"])[0].text)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from captioning.beam_search import Caption, beam_search
from captioning.checkpoint import load_checkpoint
from captioning.decoders import build_decoder
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.device import autocast, encoder_precision, pick_device, pick_precision
from captioning.encoder import Encoder, encoder_from_checkpoint
from captioning.grid import SIDE, Grid
from captioning.images import to_rgb
from config import UserError
from preprocess.vocabulary import Vocabulary


@dataclass
class Captioned:
    """A photo's caption. attention (T, 196): a row a word, over 14x14 cells; None where the decoder has none.

    sentinel (T): the share of each word that came from language alone (beta, Lu et al. 2017); None without a sentinel.
    """

    text: str
    words: list[str]
    log_probability: float  # natural, of the whole caption
    finished: bool  # False: cut at max_length
    attention: Tensor | None
    sentinel: list[float] | None
    grid: tuple[int, int] = (SIDE, SIDE)


class Captioner:
    """An encoder, a decoder and a vocabulary that belong together."""

    def __init__(self, checkpoint: dict, device: torch.device, precision: str, sees: str):
        self.device = device
        self.precision, self.encoder_precision = pick_precision(precision, device), encoder_precision(precision, device)
        self.vocabulary = Vocabulary.from_dict(checkpoint["vocabulary"])
        self.encoder_sha256 = checkpoint["encoder"]["sha256"]
        self.decoder_name = checkpoint["decoder"]["name"]
        self.decoder: nn.Module = build_decoder(self.decoder_name, checkpoint["decoder"]["sizes"])
        self.decoder.load_state_dict(checkpoint["decoder"]["state"])
        if isinstance(self.decoder, HardAttentionDecoder):
            self.decoder.sees = sees
        elif sees != HardAttentionDecoder.sees:
            raise UserError(f"--hard {sees} goes with a run of --decoder hard-attention, not {self.decoder_name}")
        self.decoder.to(device).eval().requires_grad_(False)
        self._checkpoint, self._encoder = checkpoint, None

    @classmethod
    def load(
        cls, run: Path | str, device: str = "auto", precision: str = "auto", sees: str = HardAttentionDecoder.sees
    ) -> Captioner:
        """run: a folder in checkpoints/ (its best.pt), or a checkpoint file. Raises config.UserError.

        sees: what hard attention sees of a photo, the expectation over its cells or the likeliest alone (argmax).
        """
        return cls(load_checkpoint(Path(run)), pick_device(device), precision, sees)

    @property
    def encoder(self) -> Encoder:
        """Loaded when first needed: cached features need none."""
        if self._encoder is None:
            encoder = encoder_from_checkpoint(self._checkpoint)
            self._encoder = encoder.to(self.device).eval().requires_grad_(False)
        return self._encoder

    def caption(
        self,
        photos: Sequence[Path | str | Image.Image | Tensor],
        beam_size: int = 5,
        max_length: int = 30,
        length_penalty: float = 0.0,
    ) -> list[Captioned]:
        """Captions of paths, PIL images, or tensors (3, H, W) uint8 RGB. Raises captioning.images.PhotoError."""
        squashed = [self.encoder.transform.squash(self._as_image(photo)) for photo in photos]
        if not squashed:
            return []
        return self.caption_squashed(torch.stack(squashed), beam_size, max_length, length_penalty)

    @torch.inference_mode()
    def caption_squashed(
        self, photos: Tensor, beam_size: int, max_length: int, length_penalty: float = 0.0
    ) -> list[Captioned]:
        """Captions of photos (B, 3, S, S) uint8 that went through the transform."""
        with autocast(self.device, self.encoder_precision):
            grid = self.encoder(photos.to(self.device))
        return self.caption_grid(grid, beam_size, max_length, length_penalty)

    @torch.inference_mode()
    def caption_grid(self, grid: Grid, beam_size: int, max_length: int, length_penalty: float = 0.0) -> list[Captioned]:
        """Captions of features, cached or fresh."""
        with autocast(self.device, self.precision):
            grid = grid.to(self.device, self.precision)
            found = beam_search(self.decoder, grid, beam_size, max_length, length_penalty)
        return [self._in_words(caption) for caption in found]

    def _in_words(self, caption: Caption) -> Captioned:
        words = self.vocabulary.decode(caption.words)
        text = self.vocabulary.joined(words)
        sentinel = (1 - caption.attention.sum(1)).tolist() if self.decoder.has_sentinel else None
        return Captioned(text, words, caption.log_probability, caption.finished, caption.attention, sentinel)

    def _as_image(self, photo: Path | str | Image.Image | Tensor) -> Image.Image:
        if isinstance(photo, Tensor):
            return Image.fromarray(photo.permute(1, 2, 0).cpu().numpy()).convert("RGB")
        return to_rgb(photo) if isinstance(photo, Image.Image) else self.encoder.transform.open(photo)
