"""The evidence of words on drawn scenes, by kind of word, and that of planted lies.

    python -m preprocess data/scenes-zh --scenes 2000 --language zh      (or: make demo)
    python -m captioning.calibrate checkpoints/scenes-zh
    python bench/evidence.py checkpoints/scenes-zh data/scenes-zh

The captions are the true ones of the test scenes. A planted lie is such a caption in which a colour is replaced by that
of another scene, which no object of this one has.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from captioning.captioner import Captioner
from captioning.features.feature_reader import FeatureReader
from preprocess.captions import Photo, read_captions
from preprocess.drawing import Scene
from preprocess.scenes import WORDS, read_scenes

KINDS = ("colour", "shape", "size", "background", "relation", "count")
FUNCTION_WORDS = frozenset("a the in on to of one shapes 一 一个 一颗 的 里 上 有 在 和 图形".split())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a calibrated run")
    parser.add_argument("data", type=Path, help="folder of its scenes")
    parser.add_argument("--features", type=Path, help="their cached features; DATA/features.h5 unless given")
    settings = parser.parse_args()
    captioner = Captioner.load(settings.run)
    photos = [photo for photo in read_captions(settings.data) if photo.split == "test"]
    scenes = read_scenes(settings.data)
    reader = FeatureReader(settings.features or settings.data / "features.h5")
    measure(captioner, reader, photos, scenes)


def measure(captioner: Captioner, reader: FeatureReader, photos: Sequence[Photo], scenes: dict[str, Scene]) -> None:
    """Print the evidence of the words of true captions, and of planted lies."""
    language = captioner.vocabulary.language
    lies = [plant_lie(photo, photos, scenes, language) for photo in photos]
    captions = [
        [*map(list, photo.captions), *(words for words, _ in of_photo)]
        for photo, of_photo in zip(photos, lies, strict=True)
    ]
    read = reader.read if captioner.decoder.uses_attention else reader.read_pooled
    evidence = captioner.evidence_of(read(reader.rows_of(photo.id for photo in photos)), captions)
    by_kind = defaultdict(list)
    planted = []
    for photo, of_photo, values in zip(photos, lies, evidence, strict=True):
        for words, numbers in zip(photo.captions, values, strict=False):
            for word, number in zip(words, numbers, strict=True):
                by_kind[kind_of(word, language)].append(number)
        planted += [numbers[at] for (_, at), numbers in zip(of_photo, values[len(photo.captions) :], strict=True)]
    print(f"{'words':<12} {'number':>7} {'median':>7} {'mean':>7} {'above 0':>8}")
    for kind in (*KINDS, "function"):
        print_row(kind, by_kind[kind])
    print_row("planted lies", planted)


def print_row(name: str, evidence: Sequence[float]) -> None:
    """Statistics of the evidence of some words, in nats."""
    if evidence:
        values = np.array(evidence)
        above = (values > 0).mean()
        print(f"{name:<12} {len(values):>7,} {np.median(values):>+7.2f} {values.mean():>+7.2f} {above:>8.1%}")


def kind_of(word: str, language: str) -> str:
    """The kind of fact that a word states: one of KINDS, or function."""
    if word not in FUNCTION_WORDS:
        for kind in KINDS:
            for phrases in WORDS[language][kind].values():
                for phrase in phrases:
                    if word in phrase.split() or (language == "zh" and (phrase in word or word in phrase)):
                        return kind
    return "function"


def plant_lie(
    photo: Photo, photos: Sequence[Photo], scenes: dict[str, Scene], language: str
) -> list[tuple[list[str], int]]:
    """For each caption with a colour, it with one of another scene instead, and the index of that word."""
    rng = random.Random(photo.id)
    own = {object.colour for object in scenes[photo.id].objects}
    others = [object.colour for other in photos for object in scenes[other.id].objects if object.colour not in own]
    words_of = WORDS[language]["colour"]
    colours = {word for words in words_of.values() for word in words}
    lies = []
    for words in photo.captions:
        places = [index for index, word in enumerate(words) if word in colours]
        if places:
            place = rng.choice(places)
            lies.append(([*words[:place], words_of[rng.choice(others)][0], *words[place + 1 :]], place))
    return lies


if __name__ == "__main__":
    main()
