"""A run as files for programs without Kantu: ONNX, or torch.export's.

    python -m captioning.export checkpoints/att                    writes checkpoints/att/export/*.onnx
    python -m captioning.export checkpoints/att --format torch     the same as *.pt2, for torch.export.load

    encoder   photos (B, 3, S, S) uint8 -> cells (B, N, C)
    begin     cells -> photo_0, ..., the same at every word; row_0, ..., other ones after every word; all (B, ...)
    step      words (B) int64, photo_0, ..., row_0, ... -> log_probabilities (B, V), attention (B, P) of a decoder that
              attends, next_row_0, ...

All else is float32, and B may be any number; for several captions of a photo repeat what is its. description.json has
the shapes, the words, and what is done to a photo: tests/caption_with_onnxruntime.py captions with these files alone.

Letters: B photos, S pixels a side, N native cells, P output cells, C channels, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from captioning.captioner import BEAM, Captioner
from captioning.checkpoint import fitting
from captioning.decoders.protocol import Decoder, State
from captioning.encoder import Encoder
from captioning.grid import Grid
from command_line import run
from config import Export, UserError
from preprocess.files import draft
from preprocess.vocabulary import END, PAD, START, UNKNOWN

OLDEST = "2.13"  # torch whose ONNX of an LSTM is sound
DESCRIPTION = "description.json"
ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}


def encode(encoder: Encoder, photos: Tensor) -> tuple[Tensor, ...]:
    return (encoder(photos).cells,)


def begin(decoder: Decoder, pooling: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
    photos, rows = decoder.begin(Grid(cells, pooling))
    return (*photos, *rows)


def step(decoder: Decoder, per_photo: int, words: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """One caption a photo: were their numbers free of one another, torch would rule out equal ones, or refuse."""
    said, attention, (_, rows), _ = decoder.step(words, State(state[:per_photo], state[per_photo:]))
    return (said, *rows) if attention is None else (said, attention, *rows)


class Part(nn.Module):
    """compute(*fixed, *inputs) as a module, which torch exports; with examples of its inputs and outputs, by name.

    fixed[0]: the model, whose weights are part of it.
    """

    def __init__(self, compute: Callable, fixed: tuple, inputs: dict[str, Tensor], outputs: Sequence[str]):
        super().__init__()
        self.compute, self.model, self.fixed = compute, fixed[0], fixed
        self.eval().requires_grad_(False)
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
    state = decoder.begin(grid)
    fixed, rows = [f"photo_{i}" for i in range(len(state.photos))], [f"row_{i}" for i in range(len(state.rows))]
    encoding = Part(encode, (encoder,), {"photos": photos}, ["cells"])
    beginning = Part(begin, (decoder, grid.pooling), encoding.outputs, fixed + rows)
    inputs = {"words": torch.full((2,), START), **beginning.outputs}
    outputs = ["log_probabilities", *["attention"] * decoder.sees_cells, *(f"next_{name}" for name in rows)]
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
                program = torch.onnx.export(*what, dynamo=True, verbose=False, dynamic_shapes=dynamic, **names)
                return program.model_proto.SerializeToString()
            file = io.BytesIO()
            torch.export.save(torch.export.export(*what, dynamic_shapes=dynamic, strict=False), file)
            return file.getvalue()
    except Exception as error:  # torch has a dozen ways to say that it cannot
        reason = " ".join(str(error.__cause__ or error).split())[:160]
        what = f"--format {format}: torch {torch.__version__} cannot export the {name}"
        raise UserError(f"{what} ({reason}); try a newer torch, or the other format") from None


def description(captioner: Captioner, parts: dict[str, Part], format: str) -> dict:
    """What a program needs to know beside the files, as plain data."""
    transform, vocabulary = captioner.encoder.transform, captioner.vocabulary
    return {
        "decoder": captioner.decoder_name,
        "encoder": captioner.encoder.name,
        "photo": "upright, RGB, squashed to image_size x image_size by Pillow's resize with BILINEAR; no normalisation",
        "image_size": transform.image_size,
        "scaled_decoding": transform.scaled_decoding,  # before: Pillow's draft(None, twice that size)
        "start": START,
        "end": END,
        "never": [PAD, UNKNOWN, START],  # words that are not written
        "max_length": BEAM.max_length,
        "joined_by": vocabulary.joined(["", ""]),
        "parts": {
            name: {"file": name + ENDINGS[format], "inputs": _shapes(part.inputs), "outputs": _shapes(part.outputs)}
            for name, part in parts.items()
        },
        "words": list(vocabulary.words),
    }


def _shapes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Such as {"photos": "uint8 (B, 3, 256, 256)"}."""
    return {name: f"{tensor.dtype} ({', '.join(['B', *map(str, tensor.shape[1:])])})".removeprefix("torch.")
            for name, tensor in tensors.items()}  # fmt: skip


def check_onnx() -> None:
    """Raises UserError, naming what to install, where something is missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    remedy = "or give --format torch"
    if missing:
        install = "run: pip install -c constraints.txt '.[export]'"
        raise UserError(f"--format onnx: {' and '.join(missing)} not installed; {install}, {remedy}")
    if torch.__version__ < OLDEST:  # as versions, not as text
        raise UserError(f"--format onnx: torch {torch.__version__} cannot; install torch {OLDEST} or newer, {remedy}")


@torch.no_grad()
def main(config: Export) -> None:
    if config.format == "onnx":
        check_onnx()
    folder = config.out or (config.run if config.run.is_dir() else config.run.parent) / "export"
    captioner = Captioner.load(config.run, "cpu", "float32")
    with fitting(config.run):
        parts = parts_of(captioner)
    about = description(captioner, parts, config.format)
    paths = [folder / DESCRIPTION, *(folder / part["file"] for part in about["parts"].values())]
    if not config.overwrite and (there := [path for path in paths if path.exists()]):
        raise UserError(f"{there[0]}: is there already; give --overwrite, or another --out")
    with contextlib.ExitStack() as drafts:  # the first is renamed last: where a description is, all is
        files = [drafts.enter_context(draft(path, binary=True)) for path in paths]
        files[0].write(json.dumps(about, ensure_ascii=False, indent=1).encode())
        for (name, part), file in zip(parts.items(), files[1:], strict=True):
            file.write(exported(name, part, config.format))
    for path in paths:
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    run(Export, main)
