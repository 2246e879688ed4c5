"""Checks of the captions alone: repeated texts, languages, left and right, lengths, words of one split."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import permutations

from captioning.dataset.caption_dataset import sides_of
from captioning.doctor.findings import Check, Finding, worst_first
from preprocess.captions import Photo
from preprocess.languages import LANGUAGES

Caption = tuple[str, ...]

SHOWN_PHOTOS = 3  # of those that share a text or a word
MAX_FOREIGN = 0.5  # fraction of the letters, or of the words, of a caption in the data set's language
MIN_WORDS_FOR_LANGUAGE = 3  # a shorter caption may well be all rare words
LENGTH_RATIO = 2.5  # a caption so many times longer or shorter than the median is listed
MAX_EXPECTED_BY_CHANCE = 1.0  # words that would be in one split alone by chance, of all those that are listed


def check_texts(photos: Sequence[Photo], language: str) -> list[Check]:
    """All checks of the captions. language: a name in LANGUAGES."""
    return [
        Check(
            "canned_texts",
            "Canned texts",
            "One text at several photos: of a template, or copied. Long texts at many photos come first.",
            canned_texts(photos),
        ),
        Check(
            "repeated_texts",
            "Texts repeated at one photo",
            "The same words twice or more among the captions of a photo: they count several times in training.",
            repeated_texts(photos),
        ),
        Check(
            "language",
            "Another language",
            "Captions in another script, or mostly of words that no other photo has: another language, or misspelt.",
            foreign_captions(photos, language),
        ),
        Check(
            "sides",
            "Left or right",
            "Of two captions of a photo, one says left and the other right. Pairs with most other words in common "
            "come first: they probably mean the same thing.",
            contradicting_sides(photos),
        ),
        Check(
            "long",
            "Very long captions",
            f"More than {LENGTH_RATIO} times as many words as the median.",
            long_captions(photos),
        ),
        Check(
            "short",
            "Very short captions",
            f"Fewer words than the median divided by {LENGTH_RATIO}.",
            short_captions(photos),
        ),
        Check(
            "words_of_one_split",
            "Words that only one split has",
            "Words of several photos that are all in one split, and would not be by chance. A decoder cannot learn "
            "words that train lacks.",
            words_of_one_split(photos),
        ),
    ]


def canned_texts(photos: Sequence[Photo]) -> list[Finding]:
    """Texts of two or more photos. Score: words times further photos."""
    places: dict[Caption, list[Photo]] = defaultdict(list)
    for photo in photos:
        for caption in dict.fromkeys(photo.captions):
            places[caption].append(photo)
    return worst_first(
        [
            Finding(len(caption) * (len(found) - 1), f"at {len(found):,} photos", tuple(found[:SHOWN_PHOTOS]), caption)
            for caption, found in places.items()
            if len(found) > 1
        ]
    )


def repeated_texts(photos: Sequence[Photo]) -> list[Finding]:
    """Texts that one photo has several times. Score: words times repetitions."""
    findings = []
    for photo in photos:
        for caption, count in Counter(photo.captions).items():
            if count > 1:
                note = f"{count} of the photo's {len(photo.captions)} captions"
                findings.append(Finding(len(caption) * (count - 1), note, (photo,), caption))
    return worst_first(findings)


def foreign_captions(photos: Sequence[Photo], language: str) -> list[Finding]:
    """Captions of which most letters are of another script, or most words at no other photo."""
    photos_with = Counter(word for photo in photos for word in set().union(*photo.captions))
    findings = []
    for photo, caption in _captions(photos):
        letters = [letter for word in caption for letter in word if letter.isalpha()]
        foreign = sum(not _is_of_script(letter, language) for letter in letters) / max(len(letters), 1)
        own = sum(photos_with[word] == 1 for word in caption) / len(caption)
        if foreign > MAX_FOREIGN:
            note = f"{foreign:.0%} of its letters are of another script"
            findings.append(Finding(1 + foreign, note, (photo,), caption))
        elif own > MAX_FOREIGN and len(caption) >= MIN_WORDS_FOR_LANGUAGE:
            note = f"{own:.0%} of its words are at no other photo"
            findings.append(Finding(own, note, (photo,), caption))
    return worst_first(findings)


def _is_of_script(letter: str, language: str) -> bool:
    if script := LANGUAGES[language].script:
        return script.match(letter) is not None
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")


def contradicting_sides(photos: Sequence[Photo]) -> list[Finding]:
    """Photos of which one caption says left, another one right. Score: their other words in common (Jaccard index)."""
    findings = []
    for photo in photos:
        pairs = [
            (_overlap(one, other), one, *_sides(other))
            for one, other in permutations(photo.captions, 2)
            if len(_sides(one)) == len(_sides(other)) == 1 and _sides(one) != _sides(other)
        ]
        if pairs:
            score, caption, side = max(pairs)
            findings.append(Finding(score, f"a caption much like it says {side}", (photo,), caption))
    return worst_first(findings)


def _sides(caption: Caption) -> set[str]:
    return set().union(*map(sides_of, caption))


def _overlap(one: Caption, other: Caption) -> float:
    """Jaccard index of the words of two captions that name no side."""
    words, other_words = ({word for word in caption if not sides_of(word)} for caption in (one, other))
    return len(words & other_words) / max(len(words | other_words), 1)


def long_captions(photos: Sequence[Photo]) -> list[Finding]:
    """Captions of more than LENGTH_RATIO times the median number of words. Score: words."""
    median = _median_length(photos)
    return worst_first(
        [
            Finding(len(caption), f"{len(caption)} words; the median is {median:g}", (photo,), caption)
            for photo, caption in _captions(photos)
            if len(caption) > LENGTH_RATIO * median
        ]
    )


def short_captions(photos: Sequence[Photo]) -> list[Finding]:
    """Captions of fewer words than the median divided by LENGTH_RATIO. Score: words, negative."""
    median = _median_length(photos)
    return worst_first(
        [
            Finding(-len(caption), f"{len(caption)} words; the median is {median:g}", (photo,), caption)
            for photo, caption in _captions(photos)
            if len(caption) < median / LENGTH_RATIO
        ]
    )


def words_of_one_split(photos: Sequence[Photo]) -> list[Finding]:
    """Words of two or more photos, all in one split. Score: minus the logarithm (base 10) of the chance of it.

    The n photos of a word would all be in a split with a fraction f of the photos with probability f^n. Words are
    listed while this probability times the number of words stays below MAX_EXPECTED_BY_CHANCE.
    """
    photos_of_split = Counter(photo.split for photo in photos)
    places: dict[str, list[Photo]] = defaultdict(list)
    for photo in photos:
        for word in dict.fromkeys(word for caption in photo.captions for word in caption):
            places[word].append(photo)
    findings = []
    for word, found in places.items():
        splits = {photo.split for photo in found}
        if len(found) == 1 or len(splits) > 1 or len(photos_of_split) == 1:
            continue
        split = splits.pop()
        score = -len(found) * math.log10(photos_of_split[split] / len(photos))
        if len(places) * 10**-score < MAX_EXPECTED_BY_CHANCE:
            note = f"at {len(found)} photos, all in {split}"
            findings.append(Finding(score, note, tuple(found[:SHOWN_PHOTOS]), (word,)))
    return worst_first(findings)


def _captions(photos: Sequence[Photo]) -> Iterator[tuple[Photo, Caption]]:
    """Each caption with its photo."""
    for photo in photos:
        for caption in photo.captions:
            yield photo, caption


def _median_length(photos: Sequence[Photo]) -> float:
    return statistics.median(len(caption) for _, caption in _captions(photos))
