"""Stage 1a: annotation files -> data/NAME/captions.jsonl and vocab.json.

python -m preprocess data/aic --train ANN.json IMAGES --val ANN.json IMAGES
python -m preprocess data/coco --karpathy dataset_coco.json IMAGES
python -m preprocess data/scenes --scenes 2000 --language zh                  (needs no download)
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.signals import install_exit_handlers

    install_exit_handlers()

import contextlib
import filecmp
import functools
import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from captioning.errors import UserError
from captioning.runtime.command_line import run
from captioning.runtime.files import locked
from captioning.runtime.library_errors import reason
from config import Preprocess
from preprocess.annotations import SPLITS, Record, read_annotations
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from preprocess.report import SplitStats, split_table, vocabulary_line
from preprocess.tokenizers import default_tokenizer, detect_language, tokenize_all
from preprocess.vocabulary import SPECIAL, VOCABULARY_FILE, Vocabulary

DEFAULT_MIN_COUNT = {"zh": 2, "en": 5}


def main(config: Preprocess) -> None:
    """Preprocess, with the data folder locked."""
    with locked(config.data, config.data / ".lock"):
        preprocess(config)


def preprocess(config: Preprocess) -> None:
    """Write captions.jsonl and vocab.json, and print a summary. Raises UserError."""
    started = time.monotonic()
    records = _read_records(config)
    existing = _existing_photos(records, _image_folders(config), config.allow_missing)
    captions = list(chain.from_iterable(record.captions for record in existing))
    language = config.language or detect_language(captions)
    tokenizer = config.tokenizer or default_tokenizer(language)
    stats = {split: SplitStats() for split in SPLITS}
    with _draft_folder(config.data) as drafts:
        with contextlib.closing(tokenize_all(captions, tokenizer, config.workers)) as tokenized:
            write_captions(drafts / CAPTIONS_FILE, _tokenized_photos(existing, tokenized, stats))
        vocabulary = _build_vocabulary(config, stats["train"], language, tokenizer)
        vocabulary.save(drafts / VOCABULARY_FILE)
        _publish(drafts, config.data, config.overwrite)
    print(f"{config.data}: language {language}, tokenizer {tokenizer}, {time.monotonic() - started:.1f} s")
    print(split_table(stats, vocabulary))
    print(vocabulary_line(stats["train"].words, vocabulary, config.max_words))
    _print_left_out(stats, len(records) - len(existing), len(existing), len(captions))
    print(f"next: python extract_features.py {config.data}")


# ---- records


def _read_records(config: Preprocess) -> list[Record]:
    """The records that the command line asks for, with unique ids."""
    if config.scenes:
        from preprocess.scenes import draw_scenes  # numpy and Pillow are needed only here

        return draw_scenes(config.data, config.scenes, config.language or "zh", config.seed)
    if config.karpathy:
        file, images = config.karpathy
        return read_annotations(file, images, split=None)
    records: list[Record] = []
    for split in SPLITS:
        if source := getattr(config, split):
            file, images = source
            records += read_annotations(file, images, split)
    _check_ids(records)
    return records if config.val else _hold_out_val(records)


def _check_ids(records: list[Record]) -> None:
    """Raise UserError for an id that occurs in two splits."""
    splits: dict[str, str] = {}
    for record in records:
        other = splits.setdefault(record.id, record.split)
        if other != record.split:
            raise UserError(f"image {record.id!r} is in --{other} and in --{record.split}; remove it from one of them")


def _hold_out_val(records: list[Record]) -> list[Record]:
    """Move a tenth of train to val: the photos whose ids have the smallest hashes, at least one.

    The split of a photo depends on its id, not on the order of the photos, nor on photos that are added later.
    """
    train = [record for record in records if record.split == "train"]
    hashes = {record.id: int(hashlib.sha256(record.id.encode()).hexdigest(), 16) for record in train}
    limit = max(2**256 // 10, min(hashes.values()))
    held_out = {id for id, hash in hashes.items() if hash <= limit}
    return [
        Record(record.image, record.id, "val", record.captions) if record.id in held_out else record
        for record in records
    ]


# ---- photos


def _image_folders(config: Preprocess) -> list[Path]:
    sources = (config.train, config.val, config.test, config.karpathy)
    return [images for _, images in filter(None, sources)] or [config.data]  # drawn scenes are in the data folder


def _existing_photos(records: list[Record], folders: list[Path], allow_missing: float) -> list[Record]:
    """The records whose photo is a file in one of the image folders.

    Raises UserError if more than the fraction `allow_missing` is missing, and for a link out of the folders.
    """
    roots = tuple(map(os.path.realpath, folders))
    list_files = functools.cache(functools.partial(_list_files, roots))
    existing: list[Record] = []
    missing: list[Record] = []
    for record in records:
        folder, name = os.path.split(record.image)
        inside = list_files(folder).get(name)
        if inside is None:
            missing.append(record)
        elif inside:
            existing.append(record)
        else:
            raise UserError(f"{record.image}: links to a file outside the image folder; put the photo itself there")
    if len(missing) > allow_missing * len(records):
        fraction = len(missing) / len(records)
        raise UserError(
            f"{missing[0].image}: no such photo; {len(missing):,} of {len(records):,} photos ({fraction:.1%}) are "
            f"missing; check the image folder, or leave them out with --allow-missing {math.ceil(100 * fraction) / 100}"
        )
    return existing


def _list_files(roots: tuple[str, ...], folder: str) -> dict[str, bool]:
    """The names of the files in a folder, each with whether the file is in one of the roots, links resolved.

    The folder is listed once: that is faster than asking the file system for each of up to 240,000 photos.
    """
    folder_is_inside = _is_inside(folder or ".", roots)
    try:
        with os.scandir(folder or ".") as entries:
            return {
                entry.name: _is_inside(entry.path, roots) if entry.is_symlink() else folder_is_inside
                for entry in entries
                if entry.is_file()
            }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason(error)}); check its permissions") from None


def _is_inside(path: str, roots: tuple[str, ...]) -> bool:
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, root]) == root for root in roots)


# ---- captions and vocabulary


def _tokenized_photos(
    records: list[Record], tokenized: Iterator[list[str]], stats: Mapping[str, SplitStats]
) -> Iterator[Photo]:
    """Yield the records with tokenized captions, and add them to the statistics.

    tokenized: the words of every caption of the records, in order. Captions without words, and photos without captions,
    are left out.
    """
    for record in tqdm(records, "tokenizing captions", unit=" photos"):
        captions = tuple(tuple(words) for words in islice(tokenized, len(record.captions)) if words)
        if captions:
            photo = Photo(record.image, record.id, record.split, captions)
            stats[record.split].add(photo)
            yield photo


def _build_vocabulary(config: Preprocess, train: SplitStats, language: str, tokenizer: str) -> Vocabulary:
    """The vocabulary of the train split. Raises UserError if it has no photos, or no word occurs often enough."""
    if not train.photos:
        source, *_ = config.karpathy or config.train or ["--scenes"]
        raise UserError(f"{source}: train is empty: no photo is on disk with a caption; check photos and captions")
    min_count = config.min_count or DEFAULT_MIN_COUNT[language]
    vocabulary = Vocabulary.from_counts(
        train.words, language=language, tokenizer=tokenizer, min_count=min_count, max_words=config.max_words
    )
    if len(vocabulary) == len(SPECIAL):
        raise UserError(f"no word occurs {min_count} times in train; give a lower --min-count, or more captions")
    return vocabulary


# ---- output


@contextlib.contextmanager
def _draft_folder(data: Path) -> Iterator[Path]:
    """A folder in `data` for files that are not final. It is removed at the end; the next start removes a leftover."""
    folder = data / ".draft"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{data}: cannot be written to ({reason(error)}); give another folder") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(drafts: Path, data: Path, overwrite: bool) -> None:
    """Move the files from `drafts` to `data`. Raises UserError if a file there differs and `overwrite` is off.

    captions.jsonl is removed first and written last, so that a kill never leaves it with the vocabulary of other
    captions. A vocabulary without captions.jsonl is left over from a kill and may be replaced.
    """
    if (data / CAPTIONS_FILE).exists():
        changed = [name for name in (VOCABULARY_FILE, CAPTIONS_FILE) if _differs(drafts / name, data / name)]
        if changed and not overwrite:
            raise UserError(
                f"{data / changed[0]}: made with other settings or annotations; replace it with --overwrite"
            )
        if changed:
            (data / CAPTIONS_FILE).unlink()
    for name in (VOCABULARY_FILE, CAPTIONS_FILE):
        os.replace(drafts / name, data / name)


def _differs(draft: Path, file: Path) -> bool:
    return file.exists() and not filecmp.cmp(draft, file, shallow=False)


def _print_left_out(stats: Mapping[str, SplitStats], missing: int, photos: int, captions: int) -> None:
    """missing: photos that are not on disk; photos, captions: those that were tokenized."""
    wordless = captions - sum(split.captions for split in stats.values())
    captionless = photos - sum(split.photos for split in stats.values())
    if missing or wordless:
        print(
            f"left out: {missing:,} photos missing on disk; {wordless:,} captions without words, "
            f"and {captionless:,} photos that have no other caption"
        )


if __name__ == "__main__":
    run(Preprocess, main)
