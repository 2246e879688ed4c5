"""Checkpoints: safe, atomic, self-contained. Tensors and plain data, read with weights_only=True, always.

A checkpoint is a dict: format, config, vocabulary, encoder (name, transform, weights' name and sha256; the
weights themselves unless they are torchvision's), decoder, epoch, step, best, and the state that `--resume` needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from captioning.errors import UserError
from captioning.runtime.files import atomic_write
from captioning.runtime.library_errors import reason
from captioning.runtime.signals import defer_signals

FORMAT = "kantu checkpoint 1"
# Settings that may differ between a run and its --resume: they decide how it is computed, not what.
MAY_CHANGE = {
    "epochs",
    "patience",
    "val_photos",
    "save_every",
    "precision",
    "device",
    "workers",
    "resume",
    "overwrite",
    "allow_missing",
    "features",
    "features_on",
    "start_from",
    "checkpoint_activations",
    "cuda_graphs",
    "preview_photos",
    "dashboard",
}
RUN = ("config", "vocabulary", "encoder", "decoder", "progress")  # what a run's checkpoint holds ...
STATE = ("optimizer", "objective", "scaler", "rng", "average")  # ... and its last.pt, for --resume


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Whole or not at all: a kill leaves the old file or the new one."""
    try:
        with defer_signals(), atomic_write(path) as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
    except (OSError, RuntimeError) as error:  # torch's writer of zip files has its own word for a full disk
        cause = reason(error) if isinstance(error, OSError) else "is the disk full?"
        raise UserError(
            f"{path}: cannot write the checkpoint ({cause}); free some space, and give the same command "
            "(train.py: with --resume)"
        ) from error


def load_checkpoint(path: Path) -> dict:
    """Read a run's checkpoint onto the CPU; a folder stands for its best.pt, else its last.pt.

    Raises UserError where there is none or it is not ours.
    """
    path = Path(path)
    if path.is_dir():
        file = next((path / name for name in ("best.pt", "last.pt") if (path / name).exists()), None)
        if file is None:
            raise UserError(
                f"{path}: no best.pt or last.pt in it; train a run with: python train.py DATA --run {path.name}"
            )
        path = file
    if not path.exists():
        raise UserError(f"{path}: no such run; the runs are the folders in checkpoints/")
    return read_checkpoint(path, RUN, "give a run in checkpoints/")


def read_checkpoint(path: Path, holds: Sequence[str], remedy: str) -> dict:
    """The checkpoint in this file. Raises UserError, ending in `remedy`, where it is not ours, or lacks one."""
    checkpoint = load_tensors(path, "a Kantu checkpoint", remedy)
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != FORMAT:
        raise UserError(
            f"{path}: not a checkpoint of this version of Kantu (format {found!r}, not {FORMAT!r}); update Kantu, or "
            f"{remedy}"
        )
    if missing := [name for name in holds if name not in checkpoint]:
        raise UserError(f"{path}: a checkpoint without {missing[0]}; {remedy}")
    return checkpoint


@contextlib.contextmanager
def checkpoint_errors(source: object) -> Iterator[None]:
    """Where what a checkpoint holds is taken up: a part that is missing, or other than we write it, is a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{source}: damaged, or of another version of Kantu ({what}); train again") from None


def load_tensors(path: Path, kind: str, remedy: str) -> object:
    """What torch.save wrote, tensors and plain data alone, onto the CPU.

    Raises UserError, calling it no `kind` and ending in `remedy`, where it is damaged, if only by a bit, or unsafe.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():  # torch does not compare the checksums that it writes
                    raise ValueError(f"{damaged} has changed since it was written")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what we are about to refuse
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check the path and its permissions") from None
    except Exception as error:  # torch reports a foreign or damaged file in a dozen ways
        raise UserError(f"{path}: not {kind}, or damaged ({reason(error)}); {remedy}") from None


def load_for_resume(folder: Path, config: dict) -> dict | None:
    """The checkpoint to go on from, or None for a new run. config: train.py's, as plain data.

    Raises UserError where a run would be lost, or would go on with other settings than it began with.
    """
    last = folder / "last.pt"
    if not config["resume"]:
        if last.exists() and not config["overwrite"]:
            raise UserError(f"{folder}: is there already; go on with --resume, or start anew with --overwrite")
        return None
    if not last.exists():
        return None  # killed before its first checkpoint: it starts again
    remedy = f"start another --run from its best.pt (--start-from {folder}), or this one anew (--overwrite)"
    saved = read_checkpoint(last, RUN + STATE, remedy)
    with checkpoint_errors(last):
        before = dict(saved["config"])
    for name, value in config.items():
        was = before.get(name, value)
        if name not in MAY_CHANGE and was != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value}: {folder} was trained with {was}; resume with that, or name a new --run")
    return saved


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """The sha256 of a state dict: names, shapes, types and bytes, whatever file it came in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
