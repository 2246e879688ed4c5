"""How much of what a run says of drawn scenes is true.

    python -m captioning.truth checkpoints/scenes-zh
    python -m captioning.truth checkpoints/ANY --data data/scenes-zh --json truth.json

The scenes are those that the run was trained on, unless --data names others; docs/truth.md says what is measured.
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command

    start_command()

import json
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.captioner import Captioner
from captioning.errors import UserError
from captioning.evaluation.statements import JudgedCaption, report
from captioning.runtime.checkpoint import checkpoint_errors, load_checkpoint
from captioning.runtime.files import atomic_text
from captioning.search.options import SearchOptions
from preprocess.captions import read_captions
from preprocess.scenes import SCENES_FILE, read_scenes
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary

if TYPE_CHECKING:
    from config import Truth

DEFAULT_SEARCH = SearchOptions()


def judge_run(
    captioner: Captioner, data: Path, split: str = "test", search: SearchOptions = DEFAULT_SEARCH
) -> list[JudgedCaption]:
    """Caption the scenes of a split and judge the captions.

    Raises UserError if the data set has no such scenes, or captions in another language.
    """
    scenes = read_scenes(data)
    dataset = list(read_captions(data))
    photos = [photo for photo in dataset if photo.split == split]
    missing = [photo.id for photo in dataset if photo.id not in scenes]
    if not photos or missing:
        which = f"no photos of the split {split}" if not photos else f"{data / SCENES_FILE} lacks {missing[0]}"
        raise UserError(f"{data}: {which}; draw scenes: python -m preprocess {data} --scenes 2000 --overwrite")
    language = captioner.vocabulary.language
    if Vocabulary.load(data / VOCABULARY_FILE).language != language:
        raise UserError(f"{data}: its captions are in another language than those of the run; give another --data")
    results = captioner.caption([photo.image for photo in photos], search)
    train = (scenes[photo.id] for photo in dataset if photo.split == "train")
    known = frozenset(combination for scene in train for combination in scene.combinations)
    return [
        JudgedCaption.judge(photo, scenes[photo.id], result, language, known)
        for photo, result in zip(photos, results, strict=True)
    ]


def main(config: Truth) -> None:
    """Judge a run, print the report, and write it if asked to. Raises UserError."""
    checkpoint = load_checkpoint(config.run)
    with checkpoint_errors(config.run):
        data = config.data or Path(checkpoint["config"]["data"])
    captioner = Captioner.load(config.run, config.device, config.precision)
    captions = judge_run(captioner, data, config.split, config.search)
    truth = report(captions)
    print(f"{config.run} ({captioner.decoder_name}): {len(captions):,} scenes of {data}, {config.split}\n{truth}")
    if captioner.calibration is None:
        print(f"no evidence and no probability; they come with: python -m captioning.calibrate {config.run}")
    if config.json:
        with atomic_text(config.json) as file:
            json.dump(truth.to_dict(), file, indent=1)


if __name__ == "__main__":
    from captioning.runtime.command_line import run
    from config import Truth

    run(Truth, main)
