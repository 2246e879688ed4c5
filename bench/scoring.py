"""The time of all metrics but Java's for 5,000 captions on one core: every protocol, with confidence intervals.

    python bench/scoring.py data/f8k-en data/f8k-zh

The metrics by word alone, as in validation, are also compared with pycocoevalcap, which gives the same scores. Times
are CPU seconds of this process.

The scored caption of a photo is the first reference of the next photo. If a data set has fewer photos, they are
repeated. METEOR and SPICE, which are Java programs, are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from tyro.conf import Positional

from captioning.caption import CaptionResult
from captioning.evaluation.metrics import score
from captioning.evaluation.score_report import score_captions
from preprocess.captions import Photo, read_captions
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
        scores, seconds = timed(partial(score_captions, pairs, vocabulary.language, vocabulary.tokenizer, java=False))
        _, interval_seconds = timed(scores.to_dict)
        references = sum(len(photo.captions) for photo in photos)
        print(
            f"{data}: {len(photos):,} photos, {references:,} references, {', '.join(scores.stats)}: "
            f"{seconds + interval_seconds:.1f} s, of which {interval_seconds:.1f} s for the confidence intervals"
        )
        compare_with_pycocoevalcap(photos, candidates)


def compare_with_pycocoevalcap(photos: list[Photo], candidates: list[Sequence[str]]) -> None:
    """Print the time of the metrics by word, and pycocoevalcap's, which must give the same scores."""
    words = {photo.id: caption for photo, caption in zip(photos, candidates, strict=True)}
    references = {photo.id: photo.captions for photo in photos}
    ours, seconds = timed(lambda: score(words, references))
    candidate_texts = {id: [" ".join(caption)] for id, caption in words.items()}
    reference_texts = {id: [" ".join(caption) for caption in captions] for id, captions in references.items()}
    bleu, bleu_seconds = timed(lambda: Bleu(4).compute_score(reference_texts, candidate_texts, verbose=0)[0])
    rouge, rouge_seconds = timed(lambda: Rouge().compute_score(reference_texts, candidate_texts)[0])
    cider, cider_seconds = timed(lambda: Cider().compute_score(reference_texts, candidate_texts)[0])
    np.testing.assert_allclose(list(ours.values()), 100 * np.array([*bleu, rouge, cider]), rtol=1e-9)
    theirs = bleu_seconds + rouge_seconds + cider_seconds
    print(
        f"  by word alone: {seconds:.2f} s; pycocoevalcap: {theirs:.2f} s (BLEU {bleu_seconds:.2f}, ROUGE-L "
        f"{rouge_seconds:.2f}, CIDEr-D {cider_seconds:.2f}), {theirs / seconds:.1f} times as long"
    )


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a function, and the CPU seconds it took."""
    started = time.process_time()
    result = function()
    return result, time.process_time() - started


if __name__ == "__main__":
    main(tyro.cli(Bench))
