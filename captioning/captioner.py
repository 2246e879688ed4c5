"""A checkpoint made ready to caption photos: the Python interface.

from captioning.captioner import Captioner
captioner = Captioner.load("checkpoints/att")
print(captioner.caption("photo.jpg").text)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from captioning.caption import Caption, CaptionResult
from captioning.decoders.ensemble import Ensemble
from captioning.decoders.factory import build_decoder
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.decoders.protocol import Decoder
from captioning.encoders.encoder import Encoder, encoder_from_checkpoint
from captioning.encoders.grid import Grid
from captioning.encoders.images import in_batches, to_rgb
from captioning.errors import PhotoError, UserError
from captioning.runtime.checkpoint import checkpoint_errors, load_checkpoint
from captioning.runtime.device import autocast, encoder_precision, pick_device, pick_precision
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from captioning.search.sampling import sample_captions
from preprocess.vocabulary import Vocabulary

BATCH = 32  # photos captioned at once
BEAM = SearchOptions()
AnyPhoto = Path | str | Image.Image | Tensor


class Captioner:
    """An encoder, a decoder and a vocabulary that belong together. Any number of threads may use one at once."""

    def __init__(self, checkpoints: Sequence[dict], device: torch.device, precision: str, sees: str):
        """checkpoints: of the run, and of others of its vocabulary and encoder, which then write each word together."""
        first = checkpoints[0]
        self.device = device
        self.precision, self.encoder_precision = pick_precision(precision, device), encoder_precision(precision, device)
        self.vocabulary = Vocabulary.from_dict(first["vocabulary"])
        self.encoder_sha256 = first["encoder"]["sha256"]
        self.decoder_name = " + ".join(checkpoint["decoder"]["name"] for checkpoint in checkpoints)
        members = [_decoder(checkpoint, sees).to(device).eval() for checkpoint in checkpoints]
        if sees != HardAttentionDecoder.sees and not any(isinstance(m, HardAttentionDecoder) for m in members):
            raise UserError(f"--hard {sees} goes with a run of --decoder hard-attention, not {self.decoder_name}")
        self.decoder: Decoder = members[0] if len(members) == 1 else Ensemble(members)
        self._checkpoint, self._encoder, self._loading = first, None, threading.Lock()

    @classmethod
    def load(
        cls,
        run: Path | str,
        device: str = "auto",
        precision: str = "auto",
        sees: str = HardAttentionDecoder.sees,
        ensemble: Sequence[Path | str] = (),
    ) -> Captioner:
        """run: a folder in checkpoints/ (its best.pt), or a checkpoint file. Raises UserError.

        sees: what hard attention sees of a photo, the expectation over its cells or the likeliest alone (argmax).
        ensemble: further runs of the same vocabulary and encoder; a word's probability is then the mean of all.
        """
        first, *others = (load_checkpoint(Path(name)) for name in (run, *ensemble))
        for name, other in zip(ensemble, others, strict=True):
            with checkpoint_errors(name):
                same = _belongs(other) == _belongs(first)
            if not same:
                raise UserError(f"{name}: is of another vocabulary or encoder than {run}; they cannot write together")
        with checkpoint_errors(run):
            return cls([first, *others], pick_device(device), precision, sees)

    @property
    def encoder(self) -> Encoder:
        """Loaded when first needed, by one thread: cached features need none."""
        with self._loading:
            if self._encoder is None:
                encoder = encoder_from_checkpoint(self._checkpoint)
                self._encoder = encoder.to(self.device).eval().requires_grad_(False)
            return self._encoder

    def caption(
        self, photos: AnyPhoto | Sequence[AnyPhoto], search: SearchOptions = BEAM
    ) -> CaptionResult | list[CaptionResult]:
        """The caption of a photo, or those of a list of them: paths, PIL images and tensors, mixed as you like.

        A tensor is RGB, (3, H, W), uint8 or floating point in 0..1. Raises captioning.encoders.images.PhotoError.
        """
        if not isinstance(photos, (list, tuple)):
            return self.caption([photos], search)[0]
        captions = []
        for batch in in_batches(photos, BATCH):
            squashed = torch.stack([self.encoder.transform.resize(self._as_image(photo)) for photo in batch])
            captions += self.caption_squashed(squashed, search)
        return captions

    @torch.no_grad()
    def caption_squashed(self, photos: Tensor, search: SearchOptions = BEAM) -> list[CaptionResult]:
        """Captions of photos (B, 3, S, S) uint8 that went through the transform."""
        with autocast(self.device, self.encoder_precision):
            grid = self.encoder(photos.to(self.device))
        return self.caption_grid(grid, search)

    @torch.no_grad()
    def caption_grid(self, grid: Grid, search: SearchOptions = BEAM) -> list[CaptionResult]:
        """Captions of features, cached or fresh."""
        find = sample_captions if search.temperature else beam_search
        with autocast(self.device, self.precision):
            found = find(self.decoder, grid.to(self.device, self.precision), search)
        in_words = [[self._in_words(caption) for caption in captions] for captions in found]
        return [replace(best, others=others) for best, *others in in_words]

    def _in_words(self, caption: Caption) -> CaptionResult:
        words = self.vocabulary.decode(caption.words)
        text = self.vocabulary.joined(words)
        sentinel = (1 - caption.attention.sum(1)).tolist() if self.decoder.has_sentinel else None
        return CaptionResult(text, words, caption.log_probability, caption.finished, caption.attention, sentinel)

    def _as_image(self, photo: AnyPhoto) -> Image.Image:
        if isinstance(photo, Tensor):
            return _from_tensor(photo)
        return to_rgb(photo) if isinstance(photo, Image.Image) else self.encoder.transform.open(photo)


def _belongs(checkpoint: dict) -> tuple[dict, str]:
    """To which words and photos: runs that agree in both can write together."""
    return checkpoint["vocabulary"], checkpoint["encoder"]["sha256"]


def _decoder(checkpoint: dict, sees: str) -> nn.Module:
    with torch.device("meta"):  # no memory yet: a damaged file may tell of any size
        decoder = build_decoder(checkpoint["decoder"]["name"], checkpoint["decoder"]["sizes"])
    decoder.load_state_dict(checkpoint["decoder"]["state"], assign=True)
    if isinstance(decoder, HardAttentionDecoder):
        decoder.sees = sees
    return decoder


def _from_tensor(photo: Tensor) -> Image.Image:
    """(3, H, W) uint8, or floating point in 0..1, to the nearest of 256 steps."""
    if photo.ndim != 3 or photo.shape[0] != 3 or not (photo.dtype == torch.uint8 or photo.is_floating_point()):
        found = f"{photo.dtype} of shape {tuple(photo.shape)}".removeprefix("torch.")
        raise PhotoError(f"a tensor, {found}: give (3, H, W) RGB, uint8 or floating point in 0..1")
    if photo.is_floating_point():
        if not bool(((photo >= 0) & (photo <= 1)).all()):
            raise PhotoError("a tensor of floating point beyond 0..1: give it as it was before it was normalised")
        photo = (255 * photo.float()).round().to(torch.uint8)
    return Image.fromarray(photo.permute(1, 2, 0).cpu().numpy())
