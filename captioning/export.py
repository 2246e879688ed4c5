"""A run as files for programs without Kantu: ONNX, or torch.export's.

    python -m captioning.export checkpoints/att                    writes checkpoints/att/export/*.onnx
    python -m captioning.export checkpoints/att --format torch     the same as *.pt2, for torch.export.load

    encoder   photos (B, 3, S, S) uint8 -> cells (B, N, C)
    begin     cells -> photo_0, ..., the same at every word; row_0, ..., other ones after every word; all (B, ...)
    step      words (B) int64, photo_0, ..., row_0, ... -> log_probabilities (B, V), attention (B, P), next_row_0, ...

All else is float32; a decoder that does not attend has no attention. B may be any number; for several captions of a
photo repeat what is its. description.json has shapes, words, and what is done to a photo: with these files alone
tests/caption_with_onnxruntime.py captions. B photos, S pixels a side, N native cells, P output cells, C channels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captioning.captioner import BEAM, Captioner
from captioning.decoders.protocol import Decoder, State
from captioning.encoders.encoder import Encoder
from captioning.encoders.grid import Grid
from captioning.errors import UserError
from captioning.runtime.checkpoint import checkpoint_errors
from captioning.runtime.files import atomic_text

if TYPE_CHECKING:
    from config import Export
from preprocess.vocabulary import END, PAD, START, UNKNOWN

OLDEST = "2.13"  # torch whose ONNX of an LSTM is sound
ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}


def encode(encoder: Encoder, photos: Tensor) -> tuple[Tensor, ...]:
    return (encoder(photos).cells,)


def init_state(decoder: Decoder, pooling: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
    photos, rows = decoder.init_state(Grid(cells, pooling))
    return (*photos, *rows)


def step(decoder: Decoder, per_photo: int, words: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """One caption a photo: were their numbers free of one another, torch would rule out equal ones, or refuse."""
    said, attention, (_, rows), _ = decoder.step(words, State(state[:per_photo], state[per_photo:]))
    return (said, *rows) if attention is None else (said, attention, *rows)


class Part(nn.Module):
    """compute(model, ..., *inputs), as torch exports it; with examples of its inputs and outputs, by name."""

    def __init__(self, compute: Callable, fixed: tuple, inputs: dict[str, Tensor], outputs: Sequence[str]):
        super().__init__()
        self.compute, self.model, self.fixed = compute, fixed[0].requires_grad_(False), fixed
        self.eval()
        # Each its own: torch would take two names of one tensor, as adaptive's first h and m are, for one input.
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.outputs = dict(zip(outputs, self(*inputs.values()), strict=True))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.compute(*self.fixed, *inputs)


def parts_of(captioner: Captioner) -> dict[str, Part]:
    """The examples are of two photos."""
    encoder, decoder, size = captioner.encoder, captioner.decoder, captioner.encoder.transform.image_size
    photos = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    grid = encoder(photos)
    state = decoder.init_state(grid)
    fixed, rows = (
        [f"photo_{i}" for i in range(len(state.per_photo))],
        [f"row_{i}" for i in range(len(state.per_caption))],
    )
    encoding = Part(encode, (encoder,), {"photos": photos}, ["cells"])
    beginning = Part(init_state, (decoder, grid.pooling), encoding.outputs, fixed + rows)
    inputs = {"words": torch.full((2,), START), **beginning.outputs}
    outputs = ["log_probabilities", *["attention"] * decoder.uses_attention, *(f"next_{name}" for name in rows)]
    return {"encoder": encoding, "begin": beginning, "step": Part(step, (decoder, len(fixed)), inputs, outputs)}


def exported(name: str, part: Part, format: str) -> bytes:
    """The file of a part. Raises UserError where torch cannot make it."""
    what, dynamic = (part, tuple(part.inputs.values())), (({0: torch.export.Dim("B")},) * len(part.inputs),)
    try:
        # With gradients: attention then takes its plain way, where no loop over the photos fixes their number.
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about itself
            if format == "onnx":
                names = {"input_names": list(part.inputs), "output_names": list(part.outputs)}
                program = torch.onnx.export(*what, **names, dynamo=True, verbose=False, dynamic_shapes=dynamic)
                return program.model_proto.SerializeToString()
            file = io.BytesIO()
            torch.export.save(torch.export.export(*what, dynamic_shapes=dynamic, strict=False), file)
            return file.getvalue()
    except Exception as error:  # torch has a dozen ways to say that it cannot
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        what = f"--format {format}: torch {torch.__version__} cannot export the {name}"
        raise UserError(f"{what} ({reason}); try a newer torch, or the other format") from None


def description(captioner: Captioner, parts: dict[str, Part], format: str) -> dict:
    """What a program needs to know beside the files, as plain data. never: words that are not written."""
    transform, vocabulary = captioner.encoder.transform, captioner.vocabulary
    return {
        "encoder": captioner.encoder.name,
        "decoder": captioner.decoder_name,
        "photo": "upright, RGB, squashed to image_size x image_size by Pillow's resize with BILINEAR; no normalisation",
        "image_size": transform.image_size,
        "scaled_decoding": transform.scaled_decoding,  # before: Pillow's draft(None, twice that size)
        "start": START,
        "end": END,
        "never": [PAD, UNKNOWN, START],
        "max_length": BEAM.max_length,
        "parts": {
            name: {"file": name + ENDINGS[format], "inputs": _shapes(part.inputs), "outputs": _shapes(part.outputs)}
            for name, part in parts.items()
        },
        "joined_by": vocabulary.join(["", ""]),
        "words": list(vocabulary.words),
    }


def _shapes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Such as {"photos": "uint8 (B, 3, 256, 256)"}."""
    return {
        name: f"{tensor.dtype} ({', '.join(['B', *map(str, tensor.shape[1:])])})".removeprefix("torch.")
        for name, tensor in tensors.items()
    }


def check_onnx() -> None:
    """Raises UserError, naming what to install, where something is missing."""
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        what, install = f"{' and '.join(missing)} not installed", "run: pip install -c constraints.txt '.[export]'"
    elif torch.__version__ < OLDEST:  # as versions, not as text
        what, install = f"torch {torch.__version__} cannot", f"install torch {OLDEST} or newer"
    else:
        return
    raise UserError(f"--format onnx: {what}; {install}, or give --format torch")


@torch.no_grad()
def main(config: Export) -> None:
    if config.format == "onnx":
        check_onnx()
    folder = config.out or (config.run if config.run.is_dir() else config.run.parent) / "export"
    captioner = Captioner.load(config.run, "cpu", "float32")
    with checkpoint_errors(config.run):
        parts = parts_of(captioner)
    about = description(captioner, parts, config.format)
    paths = [folder / "description.json", *(folder / part["file"] for part in about["parts"].values())]
    if not config.overwrite and (there := [path for path in paths if path.exists()]):
        raise UserError(f"{there[0]}: is there already; give --overwrite, or another --out")
    with contextlib.ExitStack() as drafts:  # the first is renamed last: where a description is, all is
        files = [drafts.enter_context(atomic_text(path, binary=True)) for path in paths]
        files[0].write(json.dumps(about, ensure_ascii=False, indent=1).encode())
        for (name, part), file in zip(parts.items(), files[1:], strict=True):
            file.write(exported(name, part, config.format))
    for other in (folder / f"{name}{ending}" for name in parts for ending in ENDINGS.values()):
        if other not in paths:
            other.unlink(missing_ok=True)  # of the other format, and another decoder's perhaps
    for path in paths:
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    from captioning.runtime.command_line import run
    from config import Export

    run(Export, main)
