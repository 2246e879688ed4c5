"""log.jsonl: one line when a run starts, one an epoch. It is the truth about a run; everything else shows it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
import torchvision

from config import Train, as_plain_data


class Log:
    """Appends to RUN/log.jsonl, a whole line at a time, and says the same in words."""

    def __init__(self, config: Train, resume: bool, epochs: int, first: bool):
        """resume: keep the lines of the first `epochs` epochs; first: not rank 0 writes nothing."""
        self.config, self.path = config, config.folder / "log.jsonl"
        if not first:
            self.path = Path(os.devnull)
        elif resume:
            self._forget_after(epochs)
        else:
            config.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a" if resume else "w", encoding="utf-8")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def start(self, described: dict) -> None:
        """commit, versions, device, config: a run explains itself."""
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        config = as_plain_data(self.config)
        self._line(
            {"event": "start", "time": now, "commit": _commit(), "versions": versions, **described, "config": config}
        )
        together = f", {described['processes']} processes" if described["processes"] > 1 else ""
        millions = described["decoder_parameters"] / 1e6
        print(
            f"{self.config.folder}: {self.config.decoder}, {millions:.1f} million parameters, "
            f"{described['train_photos']:,} photos to train on, {described['val_photos']:,} to validate, "
            f"{described['vocabulary']:,} words; {described['device']}, {described['precision']}{together}",
            flush=True,
        )

    def epoch(self, figures: dict, better: bool) -> None:
        self._line({"event": "epoch", **figures, "best": better})
        print(f"epoch {figures['epoch']:>2}: loss {figures['train_loss']:.3f}, val {figures['val_loss']:.3f}, "
              f"top-5 {100 * figures['top5']:.1f} %, BLEU-4 {figures['BLEU-4']:.1f}, CIDEr-D {figures['CIDEr-D']:.1f}"
              f"{' (best)' if better else ''}; {figures['train_seconds'] + figures['val_seconds']:.0f} s, "
              f"{figures['captions_per_second']:.0f} captions/s, {figures['photos_per_second']:.0f} photos/s, "
              f"waiting {figures['waiting']:.1%}, at most {figures['peak_memory_gb']:.1f} GB; "
              f"{next(iter(figures['examples'].values()), '')}", flush=True)  # fmt: skip

    def end(self, best: float | None, name: str) -> None:
        print(f"done: {self.config.folder}/best.pt has {name} {abs(best or 0):.2f} on val (greedy)", flush=True)

    def _forget_after(self, epoch: int) -> None:
        """Drop the epochs that the checkpoint does not know: they are about to be run again."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line).get("epoch", 0) <= epoch]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def _line(self, event: dict) -> None:
        self.file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self.file.flush()


def _commit() -> str | None:
    """The commit of this code, where it is a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
