"""Hand a run on: pack it into a folder that holds no pickle, and copy such folders to and from a model hub.

    python -m captioning.share pack checkpoints/att att-packed/                      # safetensors, JSON, a model card
    python -m captioning.share pack checkpoints/att att-packed/ --photo mine.jpg     # its example picture
    python -m captioning.share push att-packed/ USER/att
    python -m captioning.share pull USER/att att-packed/

generate.py, `Captioner.load` and `python -m captioning.export` take the folder as they take a run, and return the same
captions. captioning/runtime/packed_run.py describes its files.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command  # before torch, which takes seconds to import

    start_command()

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.captioner import Captioner
from captioning.encoders.images import open_photo
from captioning.encoders.loading import encoder_from_checkpoint
from captioning.errors import UserError
from captioning.runtime import hub
from captioning.runtime.checkpoint import STATE, checkpoint_errors, checkpoint_path, load_checkpoint
from captioning.runtime.files import atomic_text, atomic_write, locked, write_errors
from captioning.runtime.library_errors import reason
from captioning.runtime.log import best_epoch, preview_picture, read_log
from captioning.runtime.packed_run import (
    CALIBRATION,
    PACKED_FILES,
    has_checkpoint,
    import_safetensors,
    is_packed,
    read_packed,
    write_packed,
)
from captioning.viewing.attention_plots import CaptionedImage, draw_card
from captioning.viewing.model_card import CardSources, model_card

if TYPE_CHECKING:
    from config import Share

CARD = "README.md"
EXAMPLE = "example.png"
FOR_PEOPLE = (CARD, EXAMPLE)
OPTIONAL_FILES = (CALIBRATION, *FOR_PEOPLE)
PATH_SETTINGS = ("data", "features", "word_vectors", "weights", "start_from")  # settings of train.py that are paths


def main(config: Share) -> None:
    """Pack, push or pull. Raises UserError."""
    if config.action == "pack":
        pack(config)
    elif config.action == "push":
        push(Path(config.source), config.target, config.private)
    else:
        pull(config.source, Path(config.target))


# ---- pack


def pack(config: Share) -> None:
    """Write a run as a packed run, with a model card and an example picture."""
    source, folder = Path(config.source), Path(config.target)
    import_safetensors(folder)
    run = source if source.is_dir() else source.parent
    _check_new(folder, run, config.overwrite)
    checkpoint = load_checkpoint(source)
    log = read_log(run) if (run / "log.jsonl").exists() else []
    scores = _read_scores(config.scores, source, run)
    with checkpoint_errors(source):
        packed = _for_others(checkpoint)
        write_packed(folder, packed)
        example = _example(config.photo, source, run, log, folder / EXAMPLE)
        card = model_card(CardSources(folder.resolve().name, packed, log, scores, example))
    with atomic_text(folder / CARD) as file:
        file.write(card)
    for name in (*PACKED_FILES, *OPTIONAL_FILES):
        if (folder / name).exists():
            print(f"{folder / name}: {(folder / name).stat().st_size / 1e3:,.1f} kB")


def _check_new(folder: Path, run: Path, overwrite: bool) -> None:
    """Raise UserError if the folder to write is another's, or the run is packed already."""
    if is_packed(run) and not has_checkpoint(run):
        raise UserError(f"{run}: is packed already; copy the folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if has_checkpoint(folder):
        raise UserError(f"{folder}: is a run; give another folder")
    if not (overwrite and is_packed(folder)):
        raise UserError(f"{folder}: is not empty; give another folder, or --overwrite for one that was packed before")


def _for_others(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint to hand on: with its encoder's weights; without the state of --resume, and paths of this machine."""
    settings = {**checkpoint["config"], "dashboard": None}
    settings |= {name: _without_folder(settings[name]) for name in PATH_SETTINGS if name in settings}
    encoder = dict(checkpoint["encoder"])
    if not encoder["state"]:  # torchvision's, which a checkpoint only names
        encoder["state"] = encoder_from_checkpoint(checkpoint).body.state_dict()
    encoder["weights"] = _without_folder(encoder["weights"])
    kept = {name: value for name, value in checkpoint.items() if name not in ("format", *STATE)}
    return {**kept, "config": settings, "encoder": encoder}


def _without_folder(value: Any) -> Any:
    """A path, or a list of them, without the folder of an absolute path, which would name people and machines."""
    if isinstance(value, (list, tuple)):
        return [_without_folder(item) for item in value]
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    path, fine_tuned, more = value.partition(", fine-tuned in ")  # of an encoder
    return Path(path).name + fine_tuned + more


def _read_scores(file: Path | None, source: Path, run: Path) -> dict[str, Any] | None:
    """The scores of --scores, or of scores.json in the run's folder unless the run is newer; None if there are none."""
    path = file or run / "scores.json"
    if not file and not path.exists():
        return None
    try:
        if not file and path.stat().st_mtime < checkpoint_path(source).stat().st_mtime:
            print(f"{path}: older than the run, and left out; make it again, or give --scores FILE")
            return None
        scores = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"--scores {path}: cannot be read ({reason(error)})") from None
    except ValueError:
        scores = None
    if not isinstance(scores, dict) or not isinstance(scores.get("intervals"), dict) or "run" not in scores:
        raise UserError(f"--scores {path}: not written by generate.py RUN --scores FILE; give one that is")
    of = Path(str(scores["run"]))
    if (of.parent if of.suffix == ".pt" else of).name != run.resolve().name:
        raise UserError(f"--scores {path}: of the run {of}, not of {run}; give the file of this run")
    return scores


def _example(photo: Path | None, source: Path, run: Path, log: list[dict[str, Any]], picture: Path) -> str | None:
    """Write example.png: of --photo, or else the run's picture of its best epoch -> a sentence about it, or None."""
    if photo:
        result = Captioner.load(source, "cpu", "float32").caption(photo)
        attention = None if result.attention is None else result.attention.numpy()
        image = CaptionedImage(open_photo(photo), result.text, result.words, attention, result.grid)
        try:
            with write_errors(picture):
                draw_card(image, picture)
        except LookupError as error:  # no installed font has the caption's characters
            raise UserError(str(error)) from None
        return "A photo, and its caption with beam search."
    best = best_epoch(log) or {}
    first: dict[str, Any] = next((entry for entry in best.get("preview", []) if entry.get("picture")), {})
    drawn = preview_picture(first, run)
    if drawn is None:
        picture.unlink(missing_ok=True)  # of an earlier pack
        print("no example picture: the run has none of its best epoch; give --photo FILE")
        return None
    with write_errors(picture), atomic_write(picture) as file:
        file.write(drawn.read_bytes())
    return f"The first validation photo of the data, not selected, after epoch {best['epoch']}; greedy caption."


# ---- push and pull


def push(folder: Path, name: str, private: bool) -> None:
    """Upload a packed run to the model hub as NAME, USER/MODEL."""
    if not folder.is_dir() or not is_packed(folder):
        raise UserError(
            f"{folder}: no packed run; make one with: python -m captioning.share pack checkpoints/RUN {folder}"
        )
    read_packed(folder)  # a damaged one is not handed on
    print(f"uploaded: {hub.upload(folder, name, (*PACKED_FILES, *OPTIONAL_FILES), private)}")


def pull(name: str, folder: Path) -> None:
    """Download a packed run from the model hub. The folder appears when it is complete; a stopped pull continues."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; give another folder")
    part = folder.with_name(folder.name + ".part")
    with locked(folder, folder.with_name(folder.name + ".lock")), write_errors(folder):
        hub.download(name, part, PACKED_FILES, OPTIONAL_FILES)
        read_packed(part)
        shutil.rmtree(part / ".cache", ignore_errors=True)  # of the hub's client
        os.replace(part, folder)
    print(f"{folder}: a packed run; try: python generate.py {folder} photo.jpg")


if __name__ == "__main__":
    from captioning.runtime.command_line import run
    from config import Share

    run(Share, main)
