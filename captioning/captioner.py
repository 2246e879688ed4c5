"""The Python interface: load a trained run and caption photos.

from captioning.captioner import Captioner
captioner = Captioner.load("checkpoints/att")
print(captioner.caption("photo.jpg").text)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, overload

import torch
from torch import Tensor, nn

from captioning.caption import Caption, CaptionResult
from captioning.decoders.ensemble import Ensemble, PhotoViews, ViewEnsemble
from captioning.decoders.factory import build_decoder
from captioning.decoders.hard_attention import HardAttentionDecoder
from captioning.decoders.protocol import Decoder
from captioning.encoders.encoder import Encoder
from captioning.encoders.grid import Grid
from captioning.encoders.images import Transform, stack_photos
from captioning.encoders.loading import encoder_from_checkpoint
from captioning.encoders.photo_objects import PhotoLike, is_one_photo, list_photos, open_photo_object
from captioning.errors import UserError
from captioning.evaluation.calibration import Calibration
from captioning.evaluation.candidates import Candidates, evidence_of_words, find_candidates, mean_grid
from captioning.evaluation.consensus import NGramWeights
from captioning.runtime.checkpoint import checkpoint_errors, load_checkpoint
from captioning.runtime.device import autocast, encoder_precision, pick_device, pick_precision
from captioning.runtime.settings import non_default
from captioning.search.beam_search import beam_search
from captioning.search.forced import forced_log_probabilities
from captioning.search.graphs import DecodingGraphs
from captioning.search.options import SearchOptions
from captioning.search.sampling import sample_captions
from preprocess.vocabulary import Vocabulary

BATCH_SIZE = 32  # photos per batch of caption()
DEFAULT_SEARCH = SearchOptions()
Photos = Sequence[PhotoLike] | Iterator[PhotoLike]  # not Iterable, as arrays are, each of which is one photo
HardAttention = Literal["expectation", "argmax"]


class Captioner:
    """An encoder, a decoder and their vocabulary. Safe to use from several threads at once."""

    def __init__(
        self,
        checkpoints: Sequence[dict],
        device: torch.device,
        precision: str,
        hard_attention: HardAttention = "expectation",
        cuda_graphs: bool = True,
        trust: bool = True,
    ):
        """checkpoints: one run, or the runs of an ensemble, which share the vocabulary and the encoder of the first.

        cuda_graphs, trust: see `load`.
        """
        first = checkpoints[0]
        self.device = device
        self.precision = pick_precision(precision, device)
        self.encoder_precision = encoder_precision(precision, device)
        self.vocabulary = Vocabulary.from_dict(first["vocabulary"])
        self.encoder_sha256: str = first["encoder"]["sha256"]
        self.data = Path(first["config"]["data"]) if "data" in first["config"] else None  # as train.py was told
        self.transform = Transform.from_dict(first["encoder"]["transform"])
        self.decoder_name = " + ".join(checkpoint["decoder"]["name"] for checkpoint in checkpoints)
        decoders = [_load_decoder(checkpoint).to(device).eval() for checkpoint in checkpoints]
        self._set_hard_attention(decoders, hard_attention)
        members = cast(Sequence[Decoder], decoders)
        self.decoder = members[0] if len(members) == 1 else cast(Decoder, Ensemble(members))
        self._view_decoders: dict[int, Decoder] = {}  # number of views -> the decoder that reads so many
        self._graphs = DecodingGraphs() if cuda_graphs and device.type == "cuda" else None
        calibration = first.get("calibration") if trust else None
        self.calibration = Calibration.from_dict(calibration) if calibration else None
        self._is_calibrated_decoder = len(checkpoints) == 1 and hard_attention == "expectation"
        self._checkpoint = first
        self._encoder: Encoder | None = None
        self._encoder_lock = threading.Lock()

    def _set_hard_attention(self, decoders: Sequence[nn.Module], hard_attention: HardAttention) -> None:
        hard_decoders = [decoder for decoder in decoders if isinstance(decoder, HardAttentionDecoder)]
        if not hard_decoders and hard_attention != "expectation":
            raise UserError(
                f"--hard {hard_attention}: needs a run of --decoder hard-attention, but this is {self.decoder_name}"
            )
        for decoder in hard_decoders:
            decoder.attention_mode = hard_attention

    @classmethod
    def load(
        cls,
        run: Path | str,
        device: str = "auto",
        precision: str = "auto",
        hard_attention: HardAttention = "expectation",
        ensemble: Sequence[Path | str] = (),
        cuda_graphs: bool = True,
        trust: bool = True,
    ) -> Captioner:
        """Load a run.

        Args:
            run: a folder in checkpoints/, of which best.pt is loaded, or a checkpoint file.
            device: auto, cpu, cuda, cuda:1 or mps.
            precision: auto, float32, bfloat16 or float16.
            hard_attention: how a hard-attention decoder reads a photo: the expectation over all cells, or the most
                probable cell alone (argmax).
            ensemble: further runs with the same vocabulary and encoder. The probability of a word is then the mean of
                those of all runs.
            cuda_graphs: on a GPU, run the steps of a search as CUDA graphs, from the second batch of a size on. Threads
                then search one after the other.
            trust: with a calibrated run, also compute the probability of captions and the evidence of their words.

        Raises UserError if a run cannot be loaded, or the runs of an ensemble do not match.
        """
        first, *others = (load_checkpoint(Path(name)) for name in (run, *ensemble))
        for name, other in zip(ensemble, others, strict=True):
            with checkpoint_errors(name):
                matches = _vocabulary_and_encoder(other) == _vocabulary_and_encoder(first)
            if not matches:
                raise UserError(f"{name}: has another vocabulary or encoder than {run}; an ensemble must share both")
        with checkpoint_errors(run):
            return cls([first, *others], pick_device(device), precision, hard_attention, cuda_graphs, trust)

    @property
    def encoder(self) -> Encoder:
        """The encoder, loaded at its first use and by one thread only. Captioning cached features does not need it."""
        with self._encoder_lock:
            if self._encoder is None:
                encoder = encoder_from_checkpoint(self._checkpoint)
                encoder.for_attention = self.decoder.uses_attention
                self._encoder = encoder.to(self.device).eval().requires_grad_(False)
            return self._encoder

    @overload
    def caption(  # type: ignore[overload-overlap]  # a str is also a Sequence[str]
        self, photos: PhotoLike, search: SearchOptions = ...
    ) -> CaptionResult: ...

    @overload
    def caption(self, photos: Photos, search: SearchOptions = ...) -> list[CaptionResult]: ...

    def caption(
        self, photos: PhotoLike | Photos, search: SearchOptions = DEFAULT_SEARCH
    ) -> CaptionResult | list[CaptionResult]:
        """Caption one photo, or several, of any number and mixed types.

        A photo is a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W), RGB, uint8 or floating point in 0..1,
        the bytes of a file, or a file opened with "rb". Arrays may also be grey, (H, W), or have alpha, (H, W, 4).

        Raises captioning.errors.PhotoError if a photo cannot be read, or is of another type.
        """
        if is_one_photo(photos):
            return self._caption_all([cast(PhotoLike, photos)], search)[0]
        return self._caption_all(list_photos(cast(Photos, photos)), search)

    def _caption_all(self, photos: Sequence[PhotoLike], search: SearchOptions) -> list[CaptionResult]:
        captions = []
        transform = self.encoder.transform
        for start in range(0, len(photos), BATCH_SIZE):
            batch = photos[start : start + BATCH_SIZE]
            resized = [transform.resize(open_photo_object(photo, transform)) for photo in batch]
            captions += self.caption_resized(stack_photos(resized, transform.image_size), search)
        return captions

    @torch.no_grad()
    def caption_resized(
        self, photos: Tensor, search: SearchOptions = DEFAULT_SEARCH, views: int = 1
    ) -> list[CaptionResult]:
        """Caption photos (B, 3, S, S) uint8, as the encoder's transform returns them.

        views: of each photo, which are adjacent, (B views, 3, S, S): see `caption_views`.
        """
        return self.caption_views(self.encode(photos, views), search)

    @torch.no_grad()
    def encode(self, photos: Tensor, views: int = 1) -> list[Grid]:
        """The feature maps of each view of photos: see `caption_resized`."""
        with autocast(self.device, self.encoder_precision):
            return [self.encoder(photos[view::views].to(self.device)) for view in range(views)]

    @torch.no_grad()
    def caption_views(self, grids: Sequence[Grid], search: SearchOptions = DEFAULT_SEARCH) -> list[CaptionResult]:
        """Caption photos from one view of each or several, averaging the log-probabilities of every word.

        grids: of each view, of the same photos; the first is that of the whole photos.
        """
        if self.calibration:
            candidates = self.find_candidates(grids, search, self.calibration.mean_photo, self.calibration.weights)
            return [self._choose(photo, search, len(grids), self.calibration) for photo in candidates]
        needed = non_default(search, "choose", "samples")
        if needed:
            raise UserError(f"{needed[0]}: needs a calibrated run; run: python -m captioning.calibrate checkpoints/RUN")
        find_captions = sample_captions if search.temperature else beam_search
        with self._searching():
            decoder, photos = self._decoder_and_photos(grids)
            captions_of_photos = find_captions(decoder, cast(Grid, photos), search, self._graphs)
        return [_best_and_others([self._to_result(caption) for caption in captions]) for captions in captions_of_photos]

    @torch.no_grad()
    def caption_grid(self, grid: Grid, search: SearchOptions = DEFAULT_SEARCH) -> list[CaptionResult]:
        """Caption feature maps, cached or just computed."""
        return self.caption_views([grid], search)

    def _decoder_and_photos(self, grids: Sequence[Grid]) -> tuple[Decoder, Grid | PhotoViews]:
        """The decoder that reads so many views of a photo, and what it reads, on the device."""
        if len(grids) == 1:
            return self.decoder, grids[0].to(self.device, self.precision)
        ensemble = cast(Decoder, ViewEnsemble(self.decoder, len(grids)))
        decoder = self._view_decoders.setdefault(len(grids), ensemble)
        return decoder, PhotoViews(grids).to(self.device, self.precision)

    @contextlib.contextmanager
    def _searching(self) -> Iterator[None]:
        """One search at a time with CUDA graphs; in the arithmetic of the captioner."""
        with self._graphs.lock if self._graphs else contextlib.nullcontext(), autocast(self.device, self.precision):
            yield

    @torch.no_grad()
    def find_candidates(
        self, grids: Sequence[Grid], search: SearchOptions, mean_photo: Tensor, weights: NGramWeights
    ) -> list[Candidates]:
        """All captions found for each photo, measured. grids: as in `caption_views`; the rest: see `Calibration`."""
        with self._searching():
            decoder, photos = self._decoder_and_photos(grids)
            mean = mean_grid(mean_photo, self.device, self.precision)
            return find_candidates(decoder, photos, search, self.decoder, mean, weights, self._graphs)

    @torch.no_grad()
    def evidence_of(self, grid: Grid, captions: Sequence[Sequence[Sequence[str]]]) -> list[list[list[float]]]:
        """The evidence of each word of any captions, in words, of each photo of the grid: see `CaptionResult.evidence`.

        Words outside the vocabulary are read as <unk>. Raises UserError if the run is not calibrated.
        """
        if self.calibration is None:
            raise UserError("evidence: needs a calibrated run; run: python -m captioning.calibrate checkpoints/RUN")
        words = [[self.vocabulary.encode(caption) for caption in of_photo] for of_photo in captions]
        with self._searching():
            mean = mean_grid(self.calibration.mean_photo, self.device, self.precision)
            log_probabilities = forced_log_probabilities(self.decoder, grid.to(self.device, self.precision), words)
            evidence = evidence_of_words(log_probabilities, self.decoder, mean, words)
        return [[values[:-1].tolist() for values in of_photo] for of_photo in evidence]

    def probability_obstacle(self, search: SearchOptions, views: int = 1) -> str | None:
        """Why captions get no probability; None if they get one."""
        if self.calibration is None:
            return "the run is not calibrated"
        if not self._is_calibrated_decoder:
            return "an ensemble, or --hard argmax, is not what was calibrated"
        if search.temperature:
            return "sampled captions are not what was calibrated"
        differences = self.calibration.differences(search, views)
        return f"the run was calibrated with {' '.join(differences)}" if differences else None

    def _choose(
        self, candidates: Candidates, search: SearchOptions, views: int, calibration: Calibration
    ) -> CaptionResult:
        """The caption that `search.choose` prefers, with its probability, and the next ones."""
        features = candidates.features()
        order = calibration.order(candidates, features, search.choose)
        if not search.temperature:  # captions that are all sampled may repeat one another
            order = candidates.distinct(order)
        results = []
        for index in order[: search.num_captions]:
            result = self._to_result(candidates.captions[index])
            results.append(replace(result, evidence=candidates.evidence[index][: len(result.words)].tolist()))
        if self.probability_obstacle(search, views) is None:
            probability = calibration.models[search.choose].predict(features[order[0]])
            results[0] = replace(results[0], probability=float(probability))
        return _best_and_others(results)

    def _to_result(self, caption: Caption) -> CaptionResult:
        words = self.vocabulary.decode(caption.words)
        sentinel = None
        if self.decoder.has_sentinel and caption.attention is not None:
            sentinel = (1 - caption.attention.sum(1)).tolist()
        return CaptionResult(
            self.vocabulary.join(words), words, caption.log_probability, caption.finished, caption.attention, sentinel
        )


def _best_and_others(captions: list[CaptionResult]) -> CaptionResult:
    best, *others = captions
    return replace(best, others=others)


def _vocabulary_and_encoder(checkpoint: dict) -> tuple[dict, str]:
    return checkpoint["vocabulary"], checkpoint["encoder"]["sha256"]


def _load_decoder(checkpoint: dict) -> nn.Module:
    with torch.device("meta"):  # allocates nothing: the sizes in a damaged file may be of any magnitude
        decoder = build_decoder(checkpoint["decoder"]["name"], checkpoint["decoder"]["sizes"])
    decoder.load_state_dict(checkpoint["decoder"]["state"], assign=True)
    return decoder
