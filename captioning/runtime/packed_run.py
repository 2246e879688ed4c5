"""A run packed to be handed on: safetensors and plain JSON. Nothing in it is a pickle or can run code.

    config.json            the settings, the encoder and its transform, the decoder and its sizes, the progress
    vocab.json             the vocabulary, in the form of data/NAME/vocab.json
    encoder.safetensors    the encoder's weights
    decoder.safetensors    the decoder's weights, as the run captions: their averages after training with --ema-decay
    calibration.safetensors    the tensors of a calibrated run's calibration, named by their place in it
    SHA256SUMS             of these, in the form of the command sha256sum; written last, so that it means complete

`python -m captioning.share` packs a run, and adds README.md and example.png for people.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.errors import UserError
from captioning.runtime.files import atomic_write, write_errors
from captioning.runtime.library_errors import reason

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS = ("best.pt", "last.pt")  # of a run that is not packed, in the order in which they are preferred
PACKED_FORMAT = "kantu packed run 1"
CONFIG = "config.json"
VOCABULARY = "vocab.json"
WEIGHTS = {"encoder": "encoder.safetensors", "decoder": "decoder.safetensors"}  # part of a checkpoint -> its file
CALIBRATION = "calibration.safetensors"  # of calibrated runs only
CONTENT = (CONFIG, VOCABULARY, *WEIGHTS.values())
CHECKSUMS = "SHA256SUMS"
PACKED_FILES = (*CONTENT, CHECKSUMS)
REMEDY = "pack the run again, or get the folder again"


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a run as train.py writes it, with a checkpoint."""
    return any((folder / name).exists() for name in CHECKPOINTS)


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed run, or a part of one."""
    return any((folder / name).exists() for name in (CHECKSUMS, CONFIG, *WEIGHTS.values()))


def write_packed(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint, whose encoder has its weights, in the packed form.

    Raises UserError if safetensors is not installed or a file cannot be written.
    """
    safetensors = import_safetensors(folder)
    plain = {name: value for name, value in checkpoint.items() if name != "vocabulary"}
    contents = {VOCABULARY: _to_json(checkpoint["vocabulary"])}
    for part, name in WEIGHTS.items():
        plain[part] = {key: value for key, value in checkpoint[part].items() if key != "state"}
        contents[name] = safetensors.save(_separate(checkpoint[part]["state"]))
    if plain.get("calibration"):
        tensors: dict[str, Tensor] = {}
        plain["calibration"] = _split(plain["calibration"], "", tensors)
        contents[CALIBRATION] = safetensors.save(_separate(tensors))
    contents[CONFIG] = _to_json({**plain, "format": PACKED_FORMAT})
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
    with contextlib.ExitStack() as stack:
        # Opened first, so renamed last: if SHA256SUMS fits the other files, all of them are complete.
        for name, content in {CHECKSUMS: sums.encode(), **contents}.items():
            stack.enter_context(write_errors(folder / name))
            stack.enter_context(atomic_write(folder / name)).write(content)
    if CALIBRATION not in contents:
        (folder / CALIBRATION).unlink(missing_ok=True)  # of a run that was packed there before


def read_packed(folder: Path) -> dict[str, Any]:
    """A packed run as a checkpoint without its format. Raises UserError if a file is missing, or damaged by one bit."""
    safetensors = import_safetensors(folder)
    contents = _read_files(folder)
    with _damage(folder / CONFIG):
        checkpoint = json.loads(contents[CONFIG])
        if checkpoint.pop("format") != PACKED_FORMAT:
            raise ValueError(f"not of the form {PACKED_FORMAT!r} that this version of Kantu reads")
    with _damage(folder / VOCABULARY):
        checkpoint["vocabulary"] = json.loads(contents[VOCABULARY])
    for part, name in WEIGHTS.items():
        with _damage(folder / name):
            checkpoint[part]["state"] = safetensors.load(contents[name])
    if checkpoint.get("calibration"):
        with _damage(folder / CALIBRATION):
            _join(checkpoint["calibration"], safetensors.load(contents[CALIBRATION]))
    return checkpoint


def import_safetensors(folder: Path) -> Any:
    """The module safetensors.torch. Raises UserError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            f"{folder}: a packed run needs safetensors; run: pip install -c constraints.txt -e '.[hub]'"
        ) from None
    return safetensors.torch


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with contiguous tensors that share no memory, as safetensors wants: tied weights are there twice."""
    import torch  # here: commands that need no torch ask whether a folder is packed

    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def _split(data: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Nested dicts and lists without their tensors: those go to `tensors`, named like "/models/0/weights"."""
    from torch import Tensor

    if isinstance(data, Tensor):
        tensors[place] = data
        return None
    if isinstance(data, dict):
        return {name: _split(value, f"{place}/{name}", tensors) for name, value in data.items()}
    if isinstance(data, list):
        return [_split(value, f"{place}/{index}", tensors) for index, value in enumerate(data)]
    return data


def _join(plain: Any, tensors: dict[str, Tensor]) -> None:
    """The inverse of `_split`: put the tensors into their places."""
    for place, tensor in tensors.items():
        _, *outer, last = place.split("/")
        inner = plain
        for name in outer:
            inner = inner[int(name) if isinstance(inner, list) else name]
        inner[int(last) if isinstance(inner, list) else last] = tensor


def _to_json(data: object) -> bytes:
    return (json.dumps(data, ensure_ascii=False, indent=1) + "\n").encode()


def _read_files(folder: Path) -> dict[str, bytes]:
    """The content of the files by name, which SHA256SUMS confirms."""
    missing = [name for name in PACKED_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: an incomplete packed run, without {', '.join(missing)}; {REMEDY}")
    try:
        present = (*PACKED_FILES, CALIBRATION) if (folder / CALIBRATION).exists() else PACKED_FILES
        contents = {name: (folder / name).read_bytes() for name in present}
    except OSError as error:
        path = error.filename or folder
        raise UserError(f"{path}: cannot be read ({reason(error)}); check its permissions") from None
    sums = contents.pop(CHECKSUMS).decode(errors="replace").split()
    expected = dict(zip(sums[1::2], sums[::2], strict=False))
    for name, content in contents.items():
        if expected.get(name) != hashlib.sha256(content).hexdigest():
            raise UserError(
                f"{folder / name}: damaged, or changed since it was packed: not as in {CHECKSUMS}; {REMEDY}"
            )
    return contents


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn the errors of unexpected content into a UserError."""
    try:
        yield
    except Exception as error:  # of json, of safetensors, or of another structure
        raise UserError(f"{path}: not of a packed run ({reason(error)}); {REMEDY}") from None
