"""Files of captions: write COCO results, AI Challenger submissions and CSV; read captions of any system for scoring.

COCO results    [{"image_id": 9, "caption": "a dog"}, ...]; Kantu adds log_probability and finished, and for a run that
                is calibrated probability, words and evidence
submission      [{"image_id": "8f00f3d0", "caption": "..."}, ...]: no file suffix, no spaces, no empty caption

The format of COCO results is that of the COCO caption server, Chen et al. 2015, https://arxiv.org/abs/1504.00325.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from captioning.caption import CaptionResult
from captioning.dataset.caption_dataset import photos_in_split
from captioning.errors import UserError
from captioning.evaluation.metrics import METRICS
from captioning.evaluation.photo_names import Match, PhotoFinder, check_found, photo_name
from captioning.evaluation.score_report import CaptionedPhotos
from captioning.runtime.files import atomic_text
from preprocess.annotations import read_references
from preprocess.captions import Photo, read_captions, read_texts
from preprocess.content import read_json
from preprocess.languages import LANGUAGES, default_tokenizer, detect_language, is_cut_by_hand
from preprocess.tokenizers import describe_tokenizer, tokenize_all
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary

INTEGER = re.compile("0|[1-9][0-9]{0,99}")  # an id that COCO writes as a number

# ---- writing


def write_json(path: Path, data: object) -> None:
    """Write data as indented JSON. Raises UserError if the file cannot be written."""
    with atomic_text(path) as file:
        json.dump(data, file, ensure_ascii=False, indent=1)


def write_coco(path: Path, captioned: CaptionedPhotos) -> None:
    """Write COCO results. Captions need a log-probability. Ids are written as integers if all of them are integers.

    A decoder with a sentinel (Lu et al. 2017, https://arxiv.org/abs/1612.01887) adds the words and the fraction of each
    that came from the language model alone. Further captions of a photo are added as "others".
    """
    are_numbers = all(INTEGER.fullmatch(photo.id) for photo, _ in captioned)
    write_json(path, [_coco_entry(int(photo.id) if are_numbers else photo.id, caption) for photo, caption in captioned])


def _coco_entry(id: int | str, caption: CaptionResult) -> dict:
    entry = {"image_id": id, **_caption_fields(caption)}
    of_words = {"sentinel": caption.sentinel, "evidence": caption.evidence}
    for name, values in of_words.items():
        if values is not None:
            entry |= {"words": caption.words, name: [round(value, 4) for value in values]}
    if caption.others:
        entry["others"] = [_caption_fields(other) for other in caption.others]
    return entry


def _caption_fields(caption: CaptionResult) -> dict:
    assert caption.log_probability is not None
    fields = {
        "caption": caption.text,
        "log_probability": round(caption.log_probability, 4),
        "finished": caption.finished,
    }
    if caption.probability is not None:
        fields["probability"] = round(caption.probability, 4)
    return fields


def write_submission(path: Path, captioned: CaptionedPhotos) -> None:
    """Write an AI Challenger submission. Raises UserError if two photos would have the same name."""
    names = [photo_name(photo.id) for photo, _ in captioned]
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise UserError(f"{path}: {count} photos are named {name} without folder and suffix; rename them")
    # The challenge refuses a file with an empty caption; it drops the full stop before it scores.
    texts = ["".join(caption.text.split()) or "。" for _, caption in captioned]
    write_json(path, [{"image_id": name, "caption": text} for name, text in zip(names, texts, strict=True)])


def write_csv(path: Path, captioned: CaptionedPhotos, per_caption: np.ndarray | None) -> None:
    """Write one line per photo. per_caption: scores of each caption (N, 6), if there are references.

    There is a column of probabilities if a caption has one.
    """
    has_probability = any(caption.probability is not None for _, caption in captioned)
    with atomic_text(path) as file:
        file.write("\ufeff")  # without a byte order mark, spreadsheets show Chinese as gibberish
        table = csv.writer(file, lineterminator="\n")
        metrics = METRICS if per_caption is not None else ()
        probability_column = ["probability"] if has_probability else []
        table.writerow(["photo", "caption", "log_probability", "finished", *probability_column, *metrics])
        for index, (photo, caption) in enumerate(captioned):
            scores = [] if per_caption is None else [f"{score:.2f}" for score in per_caption[index]]
            probability = [_optional_cell(caption.probability)] if has_probability else []
            log_probability = _optional_cell(caption.log_probability)
            table.writerow([photo.id, caption.text, log_probability, caption.finished, *probability, *scores])


def _optional_cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


# ---- reading


@dataclass(frozen=True)
class References:
    """Photos with reference captions, and how these were split into words."""

    photos: list[Photo]
    language: str  # a name in preprocess.languages.LANGUAGES
    tokenizer: str
    user_dictionary: tuple[str, ...] = ()  # of jieba
    cut_by_hand: bool = False  # the words are those between spaces, in a language that does not write them
    texts: Mapping[str, Sequence[str]] | None = None  # of each photo, the captions as they were written, if known

    @property
    def tokenizer_text(self) -> str:
        """The tokenizer for people."""
        return describe_tokenizer(self.tokenizer, self.user_dictionary)

    def tokenize(self, captions: Sequence[str]) -> Iterable[list[str]]:
        """The words of captions of any system, split by `tokenizer_of`."""
        tokenizer = self.tokenizer_of(captions)
        return tokenize_all(captions, tokenizer, user_dictionary=self.user_dictionary if tokenizer == "jieba" else ())

    def tokenizer_of(self, captions: Sequence[str]) -> str:
        """The tokenizer of captions of any system: that of the references.

        If the references are cut by hand, captions keep their own cuts. Those without any are split by the tokenizer of
        the language: at whitespace, each would be a single word.
        """
        if not self.cut_by_hand:
            return self.tokenizer
        if 2 * sum(" " in caption.strip() for caption in captions) > len(captions):
            return "whitespace"
        return default_tokenizer(self.language) if self.tokenizer == "whitespace" else self.tokenizer


def read_reference_photos(
    path: Path, split: str, tokenizer: str | None = None, user_dictionary: tuple[str, ...] = ()
) -> References:
    """Read photos with reference captions: a split of data/NAME, or an annotation file.

    tokenizer, user_dictionary: for the captions of an annotation file, unless they are already tokenized (with spaces
    between Chinese words, like AI Challenger's own references); None: the default of their language. Raises UserError
    if the references cannot be read, or a tokenizer is given for data/NAME.
    """
    if not path.is_dir():
        return _read_annotation_file(path, split, tokenizer, user_dictionary)
    if tokenizer or user_dictionary:
        given = "--tokenizer" if tokenizer else "--user-dict"
        raise UserError(f"{given} requires an annotation file; the captions of {path} are already tokenized")
    vocabulary = Vocabulary.load(path / VOCABULARY_FILE)
    photos = photos_in_split(list(read_captions(path)), split, path)
    cut_by_hand = vocabulary.tokenizer == "whitespace" and not LANGUAGES[vocabulary.language].has_spaces
    texts = read_texts(path, [photo.id for photo in photos]) if vocabulary.language == "en" else None
    return References(
        [_in_lower_case(photo) for photo in photos],
        vocabulary.language,
        vocabulary.tokenizer,
        vocabulary.user_dictionary,
        cut_by_hand,
        texts,
    )


def _in_lower_case(photo: Photo) -> Photo:
    """The photo with its captions in lower case: in data sets of before, jieba kept capitals."""
    return replace(photo, captions=tuple(tuple(word.lower() for word in words) for words in photo.captions))


def _read_annotation_file(
    path: Path, split: str, tokenizer: str | None, user_dictionary: tuple[str, ...]
) -> References:
    records = read_references(path, split)
    all_texts = [text for record in records for text in record.captions]
    language = detect_language(all_texts)
    cut_by_hand = is_cut_by_hand(all_texts, language)
    tokenizer = tokenizer or default_tokenizer(language)
    if cut_by_hand:
        words = tokenize_all(all_texts, "whitespace")
    else:
        words = tokenize_all(all_texts, tokenizer, user_dictionary=user_dictionary)
    photos = []
    for record in records:
        captions = tuple(map(tuple, filter(None, islice(words, len(record.captions)))))
        if captions:
            photos.append(Photo(record.image, record.id, split, captions))
    texts = {record.id: record.captions for record in records}
    return References(photos, language, tokenizer, user_dictionary, cut_by_hand, texts)


def read_results(path: Path, references: References) -> list[tuple[Photo, CaptionResult]]:
    """Read the captions of COCO results or of a submission, and print how its image_ids were understood.

    An image_id may be the photo's id, the end of its path, its file name or its number: see
    `captioning.evaluation.photo_names`. Returns the photos that have a caption, in the order of the references, with
    their captions. Raises UserError if the file is damaged, names a photo twice, or names a photo without references.
    """
    photos = references.photos
    entries = _read_entries(path)
    finder = PhotoFinder(photos)
    matches = {name: finder.find(name) for name in entries}
    ids = f"(ids of the references are such as {photos[0].id})" if photos else "(which have no photos)"
    check_found(path, "image_ids", "photo", matches, f"give the references {ids} of its data set and split")
    name_of: dict[str, str] = {}
    for name, match in matches.items():
        other = name_of.setdefault(match.photos[0].id, name)
        if other != name:
            raise UserError(f"{path}: a photo occurs under two names, {other} and {name}; keep one caption per photo")
    print(f"{path}: image_ids were found by {_ways(matches)}")
    captioned = [(photo, entries[name_of[photo.id]]) for photo in photos if photo.id in name_of]
    texts = [entry["caption"] for _, entry in captioned]
    if references.cut_by_hand and (tokenizer := references.tokenizer_of(texts)) != "whitespace":
        print(f"{path}: captions without spaces, split by {tokenizer}; the words of the references are cut by hand")
    return [
        (photo, CaptionResult(text, words, finished=entry.get("finished")))
        for (photo, entry), text, words in zip(captioned, texts, references.tokenize(texts), strict=True)
    ]


def _ways(matches: dict[str, Match]) -> str:
    """How the names were found, with the number of each way if there are several: id (12), number (3)."""
    counts = Counter(match.way for match in matches.values()).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{way} ({count:,})" for way, count in counts)


def _read_entries(path: Path) -> dict[str, dict]:
    """The entries of a results file by image_id. Raises UserError if the file has another form."""
    data = read_json(path)
    entries: dict[str, dict] = {}
    for index, entry in enumerate(data if isinstance(data, list) else []):
        if not _is_entry(entry):
            raise UserError(f"{path}: entry {index} is not like {{'image_id': 9, 'caption': 'a dog'}}; fix it")
        id = str(entry["image_id"])
        if id in entries:
            raise UserError(f"{path}: image_id {id} occurs twice; keep one caption per photo")
        entries[id] = entry
    if not entries:
        raise UserError(f"{path}: has no list of captions; give COCO results or an AI Challenger submission")
    return entries


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("caption"), str)
        and type(entry.get("image_id")) in (int, str)  # not isinstance: a bool is an int
        and type(entry.get("finished", True)) is bool
    )
