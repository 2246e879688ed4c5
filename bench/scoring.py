"""The time of all pure-Python metrics for 5,000 captions on one core: every protocol, with confidence intervals.

    python bench/scoring.py data/f8k-en data/f8k-zh

The scored caption of a photo is the first reference of the next photo. If a data set has fewer photos, they are
repeated. METEOR and SPICE, which are Java programs, are left out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from tyro.conf import Positional

from captioning.caption import CaptionResult
from captioning.evaluation.score_report import score_captions
from preprocess.captions import read_captions
from preprocess.tokenizers import jieba_cut
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary


@dataclass(frozen=True)
class Bench:
    data: Positional[tuple[Path, ...]]  # folders made by python -m preprocess
    photos: int = 5000


def main(bench: Bench) -> None:
    jieba_cut("看图说话")  # loads the dictionary of jieba
    for data in bench.data:
        vocabulary = Vocabulary.load(data / VOCABULARY_FILE)
        existing = list(read_captions(data))
        photos = [replace(existing[number % len(existing)], id=str(number)) for number in range(bench.photos)]
        candidates = [photo.captions[0] for photo in [*photos[1:], photos[0]]]
        pairs = [
            (photo, CaptionResult(vocabulary.join(words), list(words)))
            for photo, words in zip(photos, candidates, strict=True)
        ]
        started = time.process_time()
        scores = score_captions(pairs, vocabulary.language, vocabulary.tokenizer, java=False)
        scored = time.process_time()
        scores.to_dict()
        finished = time.process_time()
        references = sum(len(photo.captions) for photo in photos)
        print(
            f"{data}: {len(photos):,} photos, {references:,} references, {', '.join(scores.stats)}: "
            f"{finished - started:.1f} s, of which {finished - scored:.1f} s for the confidence intervals"
        )


if __name__ == "__main__":
    main(tyro.cli(Bench))
