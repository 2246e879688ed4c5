"""Export a run for programs without Kantu: as ONNX files, for torch.export.load, or as a folder of web pages.

    python -m captioning.export checkpoints/att                    # writes checkpoints/att/export/*.onnx
    python -m captioning.export checkpoints/att --format torch     # writes *.pt2
    python -m captioning.export checkpoints/att --format web --out site/

The files hold three modules:

    encoder   photos (B, 3, S, S) uint8 -> cells (B, N, C)
    begin     cells -> photo_0, ... (constant over the steps) and row_0, ... (updated at every step), all (B, ...)
    step      words (B) int64, photo_0, ..., row_0, ... -> log_probabilities (B, V), attention (B, P), next_row_0, ...

Everything else is float32; a decoder without attention has no attention output. B is dynamic: for several captions per
photo, repeat the rows of its state. Rows (B, T, ...) of a transformer grow: T is the number of words read, 0 at first.
description.json holds the shapes, the vocabulary and the preprocessing of photos.
tests/caption_with_onnxruntime.py captions with these files alone.

Letters: B photos, S pixels per side, N native cells, P output cells, C channels, V vocabulary.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command  # before torch, which takes seconds to import

    start_command()

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor, nn

from captioning.captioner import DEFAULT_SEARCH, Captioner
from captioning.decoders.protocol import Decoder, State
from captioning.encoders.encoder import Encoder
from captioning.encoders.grid import Grid
from captioning.errors import UserError
from captioning.runtime.checkpoint import checkpoint_errors
from captioning.runtime.files import atomic_write, write_errors
from captioning.runtime.library_errors import reason
from captioning.web.site import fetch_runtime, site_files, smallest_models
from captioning.web.trust import trust_of
from preprocess.vocabulary import END, PAD, START, UNKNOWN

if TYPE_CHECKING:
    from config import Export

MIN_TORCH_FOR_ONNX = "2.13"  # older versions export LSTMs incorrectly
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "web": ".onnx"}


def encode(encoder: Encoder, photos: Tensor) -> tuple[Tensor, ...]:
    """The module encoder: photos (B, 3, S, S) uint8 -> cells (B, N, C)."""
    return (encoder(photos).cells,)


def init_state(decoder: Decoder, pooling: Tensor, cells: Tensor) -> tuple[Tensor, ...]:
    """The module begin: cells (B, N, C) -> the tensors of the state: per photo, per caption, growing."""
    state = decoder.init_state(Grid(cells, pooling))
    return (*state.per_photo, *state.per_caption, *state.growing)


def step(decoder: Decoder, sizes: tuple[int, int], words: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The module step: one step with one caption per photo.

    sizes: the number of tensors in State.per_photo and in State.per_caption; the rest of `tensors` grow.
    With independent batch sizes of photos and captions, torch.export would exclude equal ones, or fail.
    """
    num_per_photo, num_per_caption = sizes
    rows = tensors[num_per_photo:]
    state = State(tensors[:num_per_photo], rows[:num_per_caption], rows[num_per_caption:])
    result = decoder.step(words, state)
    attention = () if result.attention is None else (result.attention,)
    return (result.log_probabilities, *attention, *result.state.per_caption, *result.state.growing)


class ExportModule(nn.Module):
    """compute(*constants, *inputs) as a module, with an example of every input and output by name.

    constants: the model, which is frozen, and further arguments that do not change.
    growing: names of the inputs and outputs whose second dimension, T, is dynamic too.
    """

    def __init__(
        self,
        compute: Callable,
        constants: tuple,
        inputs: dict[str, Tensor],
        outputs: Sequence[str],
        growing: Sequence[str] = (),
    ):
        super().__init__()
        self.compute = compute
        self.model = constants[0].requires_grad_(False)
        self.constants = constants
        self.growing = frozenset(growing)
        self.eval()
        # clone: torch.export would merge inputs that are the same tensor, such as the first h and m of adaptive
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.outputs = dict(zip(outputs, self(*inputs.values()), strict=True))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        return self.compute(*self.constants, *inputs)


def make_modules(captioner: Captioner) -> dict[str, ExportModule]:
    """The modules encoder, begin and step, with examples of two photos."""
    encoder = captioner.encoder
    decoder = captioner.decoder
    size = encoder.transform.image_size
    photos = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    grid = encoder(photos)
    state = decoder.init_state(grid)
    per_photo = [f"photo_{i}" for i in range(len(state.per_photo))]
    rows = [f"row_{i}" for i in range(len(state.per_caption) + len(state.growing))]
    growing = rows[len(state.per_caption) :]
    encoder_module = ExportModule(encode, (encoder,), {"photos": photos}, ["cells"])
    begin_module = ExportModule(init_state, (decoder, grid.pooling), encoder_module.outputs, [*per_photo, *rows])
    words = torch.full((2,), START)
    for _ in range(2):  # torch.export would take 0 or 1 words read for a constant
        state = decoder.step(words, state).state
    tensors = (*state.per_photo, *state.per_caption, *state.growing)
    step_inputs = {"words": words, **dict(zip(begin_module.outputs, tensors, strict=True))}
    attention = ["attention"] if decoder.uses_attention else []
    step_outputs = ["log_probabilities", *attention, *(f"next_{name}" for name in rows)]
    sizes = len(state.per_photo), len(state.per_caption)
    growing = [*growing, *(f"next_{name}" for name in growing)]
    step_module = ExportModule(step, (decoder, sizes), step_inputs, step_outputs, growing)
    return {"encoder": encoder_module, "begin": begin_module, "step": step_module}


def export_module(name: str, module: ExportModule, file_format: str) -> bytes:
    """The content of a module's file. Raises UserError if torch cannot export it."""
    try:
        # With gradients enabled, attention takes its plain path, without a loop that would fix the number of photos.
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about its own exporter
            return _to_torch(module) if file_format == "torch" else _to_onnx(module)
    except Exception as error:  # torch raises many unrelated classes
        raise UserError(
            f"--format {file_format}: torch {torch.__version__} cannot export the {name} "
            f"({reason(error.__cause__ or error)}); try a newer torch, or the other format"
        ) from None


def _to_onnx(module: ExportModule) -> bytes:
    program = torch.onnx.export(
        module,
        tuple(module.inputs.values()),
        input_names=list(module.inputs),
        output_names=list(module.outputs),
        dynamo=True,
        verbose=False,
        dynamic_shapes=_dynamic_shapes(module),
    )
    assert program is not None  # with dynamo=True
    return program.model_proto.SerializeToString()


def _to_torch(module: ExportModule) -> bytes:
    program = torch.export.export(
        module, tuple(module.inputs.values()), dynamic_shapes=_dynamic_shapes(module), strict=False
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _dynamic_shapes(module: ExportModule) -> Any:
    """The first dimension of every input is B, the second of growing ones T. The nesting follows `forward(*inputs)`."""
    batch, read = torch.export.Dim("B"), torch.export.Dim("T")
    return (tuple({0: batch, 1: read} if name in module.growing else {0: batch} for name in module.inputs),)


def describe(captioner: Captioner, modules: dict[str, ExportModule], file_format: str) -> dict:
    """The content of description.json: what a program must know to use the files. never: words not to be generated."""
    transform = captioner.encoder.transform
    vocabulary = captioner.vocabulary
    return {
        "encoder": captioner.encoder.name,
        "decoder": captioner.decoder_name,
        "photo": "upright, RGB, resized to image_size x image_size by Pillow with `interpolation`; no normalisation",
        "interpolation": transform.interpolation,
        "decoding": transform.decoding,  # if not pillow, Kantu resized with torch: two grey levels away at most
        "image_size": transform.image_size,
        "scaled_decoding": transform.scaled_decoding,  # if true, Pillow's draft(None, twice image_size) comes first
        "start": START,
        "end": END,
        "never": [PAD, UNKNOWN, START],
        "max_length": DEFAULT_SEARCH.max_length,
        "parts": {
            name: {
                "file": name + SUFFIXES[file_format],
                "inputs": _describe_tensors(module.inputs, module.growing, "T"),
                "outputs": _describe_tensors(module.outputs, module.growing, "T + 1"),
            }
            for name, module in modules.items()
        },
        "joined_by": vocabulary.join(["", ""]),
        "words": list(vocabulary.words),
    }


def _describe_tensors(tensors: dict[str, Tensor], growing: Collection[str], words_read: str) -> dict[str, str]:
    """Type and shape of each tensor, such as {"photos": "uint8 (B, 3, 256, 256)"}; of growing ones the second size."""
    descriptions = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        sizes = ["B", words_read, *tensor.shape[2:]] if name in growing else ["B", *tensor.shape[1:]]
        shape = ", ".join(map(str, sizes))
        descriptions[name] = f"{dtype} ({shape})"
    return descriptions


def check_onnx(file_format: str = "onnx") -> None:
    """Raise UserError, naming what to install, if this installation cannot export ONNX, or pages of it."""
    packages = ("onnx", "onnxscript", *(["onnxruntime"] if file_format == "web" else []))
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format {file_format}: {' and '.join(missing)} not installed; run: "
            "pip install -c constraints.txt '.[export]', or give --format torch"
        )
    if torch.__version__ < MIN_TORCH_FOR_ONNX:  # a TorchVersion: compared as a version, not as text
        raise UserError(
            f"--format {file_format}: torch {torch.__version__} cannot export it; install torch {MIN_TORCH_FOR_ONNX} "
            "or newer, or give --format torch"
        )


@torch.no_grad()
def main(config: Export) -> None:
    """Write the export of a run. Raises UserError."""
    if config.format != "torch":
        check_onnx(config.format)
    name = "site" if config.format == "web" else "export"
    folder = config.out or (config.run if config.run.is_dir() else config.run.parent) / name
    if config.format == "web":
        write_site(config, folder)
    else:
        write_modules(config, folder)


def write_modules(config: Export, folder: Path) -> None:
    """Write the modules and description.json. Raises UserError."""
    _, modules, description = _load(config)
    description_path = folder / "description.json"
    module_paths = {name: folder / part["file"] for name, part in description["parts"].items()}
    paths = [description_path, *module_paths.values()]
    _check_absent(paths, config.overwrite)
    with contextlib.ExitStack() as stack:
        # Opened first, so renamed last: if description.json exists, the export is complete.
        description_file = _open_atomic(stack, description_path)
        module_files = {name: _open_atomic(stack, path) for name, path in module_paths.items()}
        description_file.write(json.dumps(description, ensure_ascii=False, indent=1).encode())
        for name, module in modules.items():
            module_files[name].write(export_module(name, module, config.format))
    _remove_other_format(folder, set(module_paths.values()))
    for path in paths:
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")


def write_site(config: Export, folder: Path) -> None:
    """Write the modules with pages that run them in a browser. Raises UserError."""
    _check_absent([folder / "index.html", folder / "model" / "description.json"], config.overwrite)
    runtime = fetch_runtime()
    captioner, modules, description = _load(config)
    models = {name: export_module(name, module, config.format) for name, module in modules.items()}
    trust = trust_of(captioner, num_cells=modules["begin"].inputs["cells"].shape[1])
    choice = smallest_models(captioner, models, config.data, config.max_changed)
    files = site_files(captioner, config.run, description, choice, trust, runtime)
    with contextlib.ExitStack() as stack:  # description.json is opened first, as above
        for file, content in [(_open_atomic(stack, folder / path), content) for path, content in files.items()]:
            file.write(content)
    size = sum(map(len, files.values())) / 1e6
    print(f"{folder}: {len(files)} files, {size:,.1f} MB; show it with: python -m captioning.serve {folder}")


def _load(config: Export) -> tuple[Captioner, dict[str, ExportModule], dict]:
    """The run, its modules, and the content of description.json. Raises UserError."""
    is_site = config.format == "web"  # the others hold no calibration
    captioner = Captioner.load(config.run, "cpu", "float32", trust=is_site)
    with checkpoint_errors(config.run):
        modules = make_modules(captioner)
    return captioner, modules, describe(captioner, modules, config.format)


def _check_absent(paths: Sequence[Path], overwrite: bool) -> None:
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise UserError(f"{existing[0]}: already exists; give --overwrite, or another --out")


def _open_atomic(stack: contextlib.ExitStack, path: Path) -> BinaryIO:
    """Open a file that appears when the stack closes. An OSError until then becomes a UserError."""
    stack.enter_context(write_errors(path))
    return stack.enter_context(atomic_write(path))


def _remove_other_format(folder: Path, written: set[Path]) -> None:
    """Remove an earlier export in the other format: its files may hold another decoder than description.json."""
    for name in ("encoder", "begin", "step"):
        for suffix in SUFFIXES.values():
            path = folder / f"{name}{suffix}"
            if path not in written:
                path.unlink(missing_ok=True)


if __name__ == "__main__":
    from captioning.runtime.command_line import run
    from config import Export

    run(Export, main)
