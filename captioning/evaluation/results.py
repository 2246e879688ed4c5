"""Files of captions: write COCO results, AI Challenger submissions and CSV; read captions of any system for scoring.

COCO results    [{"image_id": 9, "caption": "a dog"}, ...]; Kantu adds log_probability and finished
submission      [{"image_id": "8f00f3d0", "caption": "..."}, ...]: no file suffix, no spaces, no empty caption

The format of COCO results is that of the COCO caption server, Chen et al. 2015, https://arxiv.org/abs/1504.00325.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from captioning.caption import CaptionResult
from captioning.dataset.caption_dataset import photos_in_split
from captioning.errors import UserError
from captioning.evaluation.metrics import METRICS
from captioning.evaluation.photo_names import Match, PhotoFinder, check_found, photo_name
from captioning.evaluation.score_report import CaptionedPhotos
from captioning.runtime.files import atomic_text
from preprocess.annotations import read_json, read_references
from preprocess.captions import Photo, read_captions
from preprocess.tokenizers import default_tokenizer, detect_language, tokenize
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
    if caption.sentinel is not None:
        entry["words"] = caption.words
        entry["sentinel"] = [round(beta, 4) for beta in caption.sentinel]
    if caption.others:
        entry["others"] = [_caption_fields(other) for other in caption.others]
    return entry


def _caption_fields(caption: CaptionResult) -> dict:
    assert caption.log_probability is not None
    return {"caption": caption.text, "log_probability": round(caption.log_probability, 4), "finished": caption.finished}


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
    """Write one line per photo. per_caption: scores of each caption (N, 6), if there are references."""
    with atomic_text(path) as file:
        file.write("\ufeff")  # without a byte order mark, spreadsheets show Chinese as gibberish
        table = csv.writer(file, lineterminator="\n")
        metrics = METRICS if per_caption is not None else ()
        table.writerow(["photo", "caption", "log_probability", "finished", *metrics])
        for index, (photo, caption) in enumerate(captioned):
            log_probability = "" if caption.log_probability is None else f"{caption.log_probability:.4f}"
            scores = [] if per_caption is None else [f"{score:.2f}" for score in per_caption[index]]
            table.writerow([photo.id, caption.text, log_probability, caption.finished, *scores])


# ---- reading


def read_reference_photos(references: Path, split: str, tokenizer: str | None) -> tuple[list[Photo], str, str]:
    """Read photos with reference captions: a split of data/NAME, or an annotation file.

    tokenizer: for the captions of an annotation file, unless they are already tokenized (with spaces between Chinese
    words, like AI Challenger's own references); None: the default of their language. Returns photos, language and
    tokenizer. Raises UserError if the references cannot be read, or a tokenizer is given for data/NAME.
    """
    if references.is_dir():
        if tokenizer:
            raise UserError(
                f"--tokenizer requires an annotation file; the captions of {references} are already tokenized"
            )
        vocabulary = Vocabulary.load(references / VOCABULARY_FILE)
        photos = photos_in_split(list(read_captions(references)), split, references)
        return photos, vocabulary.language, vocabulary.tokenizer
    return _read_annotation_file(references, split, tokenizer)


def _read_annotation_file(path: Path, split: str, tokenizer: str | None) -> tuple[list[Photo], str, str]:
    records = read_references(path, split)
    texts = [caption for record in records for caption in record.captions]
    language = detect_language(texts)
    tokenizer = tokenizer or default_tokenizer(language)
    is_tokenized = language == "zh" and 2 * sum(" " in text.strip() for text in texts) > len(texts)
    reference_tokenizer = "whitespace" if is_tokenized else tokenizer
    photos = []
    for record in records:
        captions = [tuple(tokenize(text, reference_tokenizer)) for text in record.captions]
        captions = [words for words in captions if words]
        if captions:
            photos.append(Photo(record.image, record.id, split, tuple(captions)))
    return photos, language, tokenizer


def read_results(path: Path, photos: Sequence[Photo], tokenizer: str) -> list[tuple[Photo, CaptionResult]]:
    """Read the captions of COCO results or of a submission, and print how its image_ids were understood.

    photos: those with references. An image_id may be the photo's id, the end of its path, its file name or its number:
    see `captioning.evaluation.photo_names`. Returns the photos that have a caption, in the order of `photos`, with
    their captions. Raises UserError if the file is damaged, names a photo twice, or names a photo without references.
    """
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
    captioned = []
    for photo in photos:
        if photo.id in name_of:
            entry = entries[name_of[photo.id]]
            words = tokenize(entry["caption"], tokenizer)
            captioned.append((photo, CaptionResult(entry["caption"], words, finished=entry.get("finished"))))
    return captioned


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
