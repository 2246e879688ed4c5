"""Captions as files: COCO's results, AI Challenger's submission, a table; and those of anyone read beside references.

COCO's results    [{"image_id": 9, "caption": "a dog"}, ...]; ours also say log_probability and finished
a submission      [{"image_id": "8f00f3d0", "caption": "..."}, ...]: no ending, no spaces, no empty caption
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from captioning.caption import CaptionResult
from captioning.dataset.caption_dataset import photos_of
from captioning.encoders.images import PHOTO_ENDINGS
from captioning.errors import UserError
from captioning.evaluation.metrics import NAMES
from captioning.evaluation.score_report import Pairs
from captioning.runtime.files import atomic_text
from preprocess.annotations import read_json, read_references
from preprocess.captions import Photo, read_captions
from preprocess.tokenizers import default_tokenizer, detect_language, tokenize
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary


def write_json(path: Path, data: object) -> None:
    with atomic_text(path) as file:
        json.dump(data, file, ensure_ascii=False, indent=1)


def write_coco(path: Path, pairs: Pairs) -> None:
    """COCO's results; with a sentinel also the words, and how much of each came from language alone; with several
    captions of a photo also the others."""
    write_json(path, [_coco_line(photo.id, caption) for photo, caption in pairs])


def _coco_line(id: str, caption: CaptionResult) -> dict:
    number = id.isdecimal() and str(int(id)) == id  # COCO's ids are numbers
    line = {"image_id": int(id) if number else id, **_of(caption)}
    if caption.sentinel is not None:
        line |= {"words": caption.words, "sentinel": [round(beta, 4) for beta in caption.sentinel]}
    if caption.others:
        line["others"] = [_of(other) for other in caption.others]
    return line


def _of(caption: CaptionResult) -> dict:
    return {"caption": caption.text, "log_probability": round(caption.log_probability, 4), "finished": caption.finished}


def write_submission(path: Path, pairs: Pairs) -> None:
    """AI Challenger's form. Raises UserError where two photos would have one name."""
    names = [_without_ending(photo.id) for photo, _ in pairs]
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UserError(f"{path}: {times} photos are called {name} there, without folder and ending; rename them")
    # The challenge refuses a file with an empty caption; it drops the full stop before it scores.
    texts = ["".join(caption.text.split()) or "。" for _, caption in pairs]
    write_json(path, [{"image_id": name, "caption": text} for name, text in zip(names, texts, strict=True)])


def write_csv(path: Path, pairs: Pairs, each: np.ndarray | None) -> None:
    """A line a photo. each (N, 6): the scores of every caption by itself, where there are references."""
    with atomic_text(path) as file:
        file.write("\ufeff")  # without it, spreadsheets show Chinese as gibberish
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["photo", "caption", "log_probability", "finished", *(NAMES if each is not None else ())])
        for number, (photo, caption) in enumerate(pairs):
            scores = [] if each is None else [f"{value:.2f}" for value in each[number]]
            sure = "" if caption.log_probability is None else f"{caption.log_probability:.4f}"
            table.writerow([photo.id, caption.text, sure, caption.finished, *scores])


def _without_ending(name: str) -> str:
    """The name of a file, without its folder and the ending of a photo."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in PHOTO_ENDINGS else path.name


# ---- captions of anyone


def read_photos(references: Path, split: str, tokenizer: str | None) -> tuple[list[Photo], str, str]:
    """Photos with their references: a split of data/NAME, or an annotation file -> photos, language, tokenizer.

    tokenizer: cuts the captions of an annotation file, unless they are cut already (with spaces between Chinese words,
    as AI Challenger's own references are).
    """
    if references.is_dir():
        if tokenizer:
            raise UserError(f"--tokenizer goes with an annotation file; the captions of {references} are cut already")
        vocabulary = Vocabulary.load(references / VOCABULARY_FILE)
        photos = photos_of(list(read_captions(references)), split, references)
        return photos, vocabulary.language, vocabulary.tokenizer
    records = read_references(references, split)
    texts = [caption for record in records for caption in record.captions]
    language = detect_language(texts)
    tokenizer = tokenizer or default_tokenizer(language)
    is_cut = language == "zh" and 2 * sum(" " in text.strip() for text in texts) > len(texts)
    by = "whitespace" if is_cut else tokenizer
    photos = []
    for record in records:
        captions = [words for text in record.captions if (words := tuple(tokenize(text, by)))]
        photos += [Photo(record.image, record.id, split, tuple(captions))] if captions else []
    return photos, language, tokenizer


def read_captioned(path: Path, photos: Sequence[Photo], tokenizer: str) -> list[tuple[Photo, CaptionResult]]:
    """The photos that a results file or a submission has captions of, in their order, with those captions."""
    lines, names = _read_lines(path), _names(photos)
    strange = [name for name in lines if name not in names]
    if strange:
        raise UserError(f"{path}: image_id {strange[0]} has no references; give those of its data set and split")
    found = {names[name]: line for name, line in lines.items()}
    if len(found) < len(lines):
        raise UserError(f"{path}: a photo occurs there under two names; keep one caption a photo")
    return [
        (photo, CaptionResult(line["caption"], tokenize(line["caption"], tokenizer), finished=line.get("finished")))
        for photo in photos
        if (line := found.get(photo.id))
    ]


def _read_lines(path: Path) -> dict[str, dict]:
    """The entries of a results file by their image_id."""
    data, lines = read_json(path), {}
    for number, line in enumerate(data if isinstance(data, list) else []):
        fits = isinstance(line, dict) and isinstance(line.get("caption"), str)
        if not fits or type(line.get("image_id")) not in (int, str) or type(line.get("finished", True)) is not bool:
            raise UserError(f"{path}: entry {number} is not like {{'image_id': 9, 'caption': 'a dog'}}; mend it")
        if str(line["image_id"]) in lines:
            raise UserError(f"{path}: image_id {line['image_id']} occurs twice; keep one caption a photo")
        lines[str(line["image_id"])] = line
    if not lines:
        raise UserError(f"{path}: no list of captions, as COCO's results and AI Challenger's submissions are")
    return lines


def _names(photos: Sequence[Photo]) -> dict[str, str]:
    """What a results file may call a photo -> its id: the id itself, or a file's name that is no other photo's."""
    short = [(_without_ending(name), photo.id) for photo in photos for name in {photo.id, photo.image}]
    owners = Counter(name for name, _ in dict.fromkeys(short))
    return {name: id for name, id in short if owners[name] == 1} | {photo.id: photo.id for photo in photos}
