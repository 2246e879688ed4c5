"""Checkpoints: atomic, self-contained, and safe to load, since they hold only tensors and plain data.

A checkpoint is a dict: format, config, vocabulary, encoder (name, transform, the name and sha256 of its weights; the
weights themselves unless they are torchvision's), decoder and progress (epoch, step, best score). last.pt also holds
the state that `--resume` needs. `captioning.calibrate` adds the key calibration, which older versions ignore.
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
from captioning.runtime.packed_run import CHECKPOINTS, is_packed, read_packed
from captioning.runtime.settings import OLD_DEFAULTS, OLDER_VERSION, flag, has_old_settings
from captioning.runtime.signals import defer_signals

FORMAT = "kantu checkpoint 1"
# Settings that may differ between a run and its --resume: they decide how a result is computed, not which one.
CHANGEABLE_ON_RESUME = {
    "epochs",
    "patience",
    "recipe",
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
    "fast_path",
    "kernels",
    "calibrate",
    "preview_photos",
    "dashboard",
    "tensorboard",
}
RUN = ("config", "vocabulary", "encoder", "decoder", "progress")  # the keys of every checkpoint of a run
STATE = ("optimizer", "objective", "scaler", "rng", "ema")  # the further keys of last.pt, for --resume


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a checkpoint atomically. Raises UserError if that is impossible."""
    try:
        with defer_signals(), atomic_write(path) as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError when the disk is full
        cause = reason(error) if isinstance(error, OSError) else "is the disk full?"
        raise UserError(
            f"{path}: cannot write the checkpoint ({cause}); free some space, and give the same command "
            "(train.py: with --resume)"
        ) from error


def load_checkpoint(path: Path) -> dict:
    """Load a run's checkpoint onto the CPU.

    path: a file, or a run's folder with a best.pt or else a last.pt, or a packed run (see packed_run.py).
    Raises UserError if there is none, or if it is not a checkpoint of this version.
    """
    path = checkpoint_path(path)
    remedy = "give a run in checkpoints/"
    if path.is_dir():
        return _checked(path, {"format": FORMAT, **read_packed(path)}, RUN, remedy)
    return read_checkpoint(path, RUN, remedy)


def checkpoint_path(path: Path) -> Path:
    """What `load_checkpoint` reads: a file, or the folder of a packed run. Raises UserError if there is none."""
    path = Path(path)
    if path.is_dir():
        path = _checkpoint_in(path)
    if not path.exists():
        raise UserError(f"{path}: no such run; the runs are the folders in checkpoints/")
    return path


def _checkpoint_in(folder: Path) -> Path:
    """The checkpoint file to load of a run; the folder itself if it is packed."""
    for name in CHECKPOINTS:
        if (folder / name).exists():
            return folder / name
    if is_packed(folder):
        return folder
    raise UserError(
        f"{folder}: no best.pt or last.pt in it; train a run with: python train.py DATA --run {folder.name}"
    )


def read_checkpoint(path: Path, required: Sequence[str], remedy: str) -> dict:
    """Load a checkpoint file onto the CPU and check its format and its `required` keys.

    Raises UserError, ending in `remedy`, if a check fails.
    """
    return _checked(path, load_tensors(path, "a Kantu checkpoint", remedy), required, remedy)


def _checked(path: Path, checkpoint: object, required: Sequence[str], remedy: str) -> dict:
    """Check the format of a checkpoint, its settings and its `required` keys."""
    if not isinstance(checkpoint, dict):
        raise _wrong_format(path, type(checkpoint).__name__, remedy)
    if checkpoint.get("format") != FORMAT:
        raise _wrong_format(path, checkpoint.get("format"), remedy)
    if has_old_settings(checkpoint.get("config")):
        raise UserError(f"{path}: {OLDER_VERSION}")
    for name in required:
        if name not in checkpoint:
            raise UserError(f"{path}: a checkpoint without {name}; {remedy}")
    return checkpoint


def trained_views(checkpoint: dict) -> list[str]:
    """The views of the photos that a run was trained on. Older checkpoints name none: it was the whole photos."""
    return checkpoint.get("views", ["whole"])


def _wrong_format(path: Path, found: object, remedy: str) -> UserError:
    return UserError(
        f"{path}: not a checkpoint of this version of Kantu (format {found!r}, not {FORMAT!r}); update Kantu, or "
        f"{remedy}"
    )


@contextlib.contextmanager
def checkpoint_errors(source: object) -> Iterator[None]:
    """Turn the errors of a missing or unexpected part of a checkpoint into a UserError. source: names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        cause = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{source}: damaged, or of another version of Kantu ({cause}); train again") from None


def load_tensors(path: Path, kind: str, remedy: str) -> object:
    """Load tensors and plain data that torch.save wrote onto the CPU.

    Raises UserError, "not `kind`, or damaged ...; `remedy`", if the file is unsafe or damaged, even by one bit.
    """
    try:
        _check_crc(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused below anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check the path and its permissions") from None
    except Exception as error:  # torch reports a foreign or damaged file in a dozen ways
        raise UserError(f"{path}: not {kind}, or damaged ({reason(error)}); {remedy}") from None


def _check_crc(path: Path) -> None:
    """Compare the checksums of a zip file, which torch.load does not. Raises ValueError if one differs."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():
            raise ValueError(f"{damaged} has changed since it was written")


def load_for_resume(folder: Path, config: dict) -> dict | None:
    """Load the checkpoint to resume from; None for a new run. config: train.py's settings as plain data.

    Raises UserError if the command would overwrite a run, or resume it with settings that may not change.
    """
    last = folder / "last.pt"
    if not config["resume"]:
        if last.exists() and not config["overwrite"]:
            raise UserError(f"{folder}: already exists; continue it with --resume, or replace it with --overwrite")
        return None
    if not last.exists():
        return None  # killed before its first checkpoint: the run starts again
    remedy = f"start another --run from its best.pt (--start-from {folder}), or this one anew (--overwrite)"
    saved = read_checkpoint(last, RUN + STATE, remedy)
    with checkpoint_errors(last):
        saved_config = dict(saved["config"])
    for name, value in config.items():
        _check_unchanged(name, value, saved_config.get(name, value), folder)
    return saved


def _check_unchanged(name: str, value: object, saved: object, folder: Path) -> None:
    if value is None and saved == OLD_DEFAULTS.get(name):
        return
    if name not in CHANGEABLE_ON_RESUME and saved != value:
        raise UserError(
            f"{flag(name)} {value}: {folder} was trained with {saved}; resume with that, or name a new --run"
        )


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """The sha256 of a state dict's names, shapes, dtypes and bytes, independent of its file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
