"""The exported models in onnxruntime, for `beam_search`: what a page writes, computed here.

Letters: B photos, R captions, S pixels per side, N native cells, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from captioning.decoders.protocol import Decoder, State, Step, repeat_for_captions
from captioning.encoders.grid import Grid
from captioning.evaluation.candidates import Candidates, find_candidates
from captioning.evaluation.consensus import NGramWeights
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions

BATCH_SIZE = 8  # photos; the decoder reads the state of a photo once for each of its beams


class OnnxModels:
    """The modules encoder, begin and step of captioning/export.py. It decodes like a `Decoder`."""

    def __init__(self, models: Mapping[str, bytes], sizes: tuple[int, int], pooling: Tensor):
        """sizes: the numbers of tensors in State.per_photo and State.per_caption. pooling: see `Grid`."""
        from onnxruntime import InferenceSession

        self.sessions: dict[str, Any] = {
            name: InferenceSession(model, providers=["CPUExecutionProvider"]) for name, model in models.items()
        }
        self.sizes = sizes
        self.pooling = pooling

    def caption(self, photos: Tensor, search: SearchOptions) -> list[list[int]]:
        """The word ids of the best caption of each photo (B, 3, S, S) uint8."""
        words: list[list[int]] = []
        for grid in self._grids(photos):
            captions_of_photos = beam_search(cast(Decoder, self), grid, search)
            words += [captions[0].words for captions in captions_of_photos]
        return words

    def find_candidates(
        self, photos: Tensor, search: SearchOptions, mean_cells: Tensor, weights: NGramWeights
    ) -> list[Candidates]:
        """All captions found for each photo (B, 3, S, S) uint8, measured.

        mean_cells: those of the mean photo (1, N, C) float32; weights: see `Calibration`.
        """
        mean_photo = Grid(mean_cells, self.pooling)
        decoder = cast(Decoder, self)
        candidates: list[Candidates] = []
        for grid in self._grids(photos):
            candidates += find_candidates(decoder, grid, search, decoder, mean_photo, weights)
        return candidates

    def _grids(self, photos: Tensor) -> Iterator[Grid]:
        for batch in photos.split(BATCH_SIZE):
            (cells,) = self._run("encoder", [batch.contiguous()])
            yield Grid(cells, self.pooling)

    def init_state(self, grid: Grid) -> State:
        """See `Decoder`."""
        return self._to_state(self._run("begin", [grid.cells]))

    def step(self, words: Tensor, state: State) -> Step:
        """See `Decoder`."""
        # An exported step has one caption per photo
        per_photo = [repeat_for_captions(tensor, words) for tensor in state.per_photo]
        outputs = self._run("step", [words, *per_photo, *state.per_caption, *state.growing])
        rows = outputs[len(outputs) - len(state.per_caption) - len(state.growing) :]
        return Step(outputs[0], None, self._to_state([*state.per_photo, *rows]))

    def _to_state(self, tensors: Sequence[Tensor]) -> State:
        num_per_photo, num_per_caption = self.sizes
        rows = tuple(tensors[num_per_photo:])
        return State(tuple(tensors[:num_per_photo]), rows[:num_per_caption], rows[num_per_caption:])

    def _run(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run a module. Its inputs and outputs are in the order of description.json."""
        session = self.sessions[name]
        names = [node.name for node in session.get_inputs()]
        arrays = {key: np.ascontiguousarray(value.numpy()) for key, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, arrays)]
