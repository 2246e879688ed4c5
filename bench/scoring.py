"""How long all pure-Python scores of 5,000 captions take, on one core: every protocol, with intervals and facts.

    python bench/scoring.py data/f8k-en data/f8k-zh

The captions are those of people: the references of each photo, and the first of the next photo's to be scored. Where
there are fewer photos, they are repeated. METEOR and SPICE, which are Java programs, are left out.
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
    jieba_cut("看图说话")  # jieba reads its dictionary once
    for data in bench.data:
        vocabulary = Vocabulary.load(data / VOCABULARY_FILE)
        there = list(read_captions(data))
        photos = [replace(there[number % len(there)], id=str(number)) for number in range(bench.photos)]
        said = [photo.captions[0] for photo in [*photos[1:], photos[0]]]
        pairs = [
            (photo, CaptionResult(vocabulary.join(words), list(words)))
            for photo, words in zip(photos, said, strict=True)
        ]
        started = time.process_time()
        scores = score_captions(pairs, vocabulary.language, vocabulary.tokenizer, java=False)
        scored = time.process_time()
        scores.to_dict()
        done = time.process_time()
        references = sum(len(photo.captions) for photo in photos)
        print(
            f"{data}: {len(photos):,} photos, {references:,} references, {', '.join(scores.stats)}: "
            f"{done - started:.1f} s, of it {done - scored:.1f} s for the intervals"
        )


if __name__ == "__main__":
    main(tyro.cli(Bench))
