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
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from captioning.errors import UserError
from captioning.runtime.command_line import run
from captioning.runtime.files import locked
from config import Preprocess
from preprocess.annotations import SPLITS, Record, read_annotations
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from preprocess.report import SplitStats, split_table, vocabulary_line
from preprocess.tokenizers import default_tokenizer, detect_language, tokenize_all
from preprocess.vocabulary import SPECIAL, VOCABULARY_FILE, Vocabulary

MIN_COUNT = {"zh": 2, "en": 5}


def main(config: Preprocess) -> None:
    with locked(config.data, config.data / ".lock"):
        make(config)


def make(config: Preprocess) -> None:
    started = time.monotonic()
    given = (config.train, config.val, config.test, config.karpathy)
    folders = [folder for _, folder in filter(None, given)] or [config.data]
    records, missing = _present(_records(config), folders, config.allow_missing)
    captions = list(chain.from_iterable(record.captions for record in records))
    language = config.language or detect_language(captions)
    tokenizer = config.tokenizer or default_tokenizer(language)
    tallies = {split: SplitStats() for split in SPLITS}
    with _draft_folder(config.data) as folder:
        with contextlib.closing(tokenize_all(captions, tokenizer, config.workers)) as cut:
            write_captions(folder / CAPTIONS_FILE, _photos(records, cut, tallies))
        vocabulary = _vocabulary(config, tallies["train"], language, tokenizer)
        vocabulary.save(folder / VOCABULARY_FILE)
        _publish(folder, config.data, config.overwrite)
    print(f"{config.data}: language {language}, tokenizer {tokenizer}, {time.monotonic() - started:.1f} s")
    print(split_table(tallies, vocabulary))
    print(vocabulary_line(tallies["train"].words, vocabulary, config.max_words))
    _print_left_out(records, len(captions), missing, tallies.values())
    print(f"next: python extract_features.py {config.data}")


def _records(config: Preprocess) -> list[Record]:
    """What the command line asks for, every id once."""
    if config.scenes:
        from preprocess.scenes import draw_scenes  # here, because only drawing needs what it imports

        return draw_scenes(config.data, config.scenes, config.language or "zh", config.seed)
    if config.karpathy:
        return read_annotations(*config.karpathy, None)
    records: list[Record] = []
    for split in SPLITS:
        if files := getattr(config, split):
            records += read_annotations(*files, split)
    _check_ids(records)
    return records if config.val else _hold_out(records)


def _check_ids(records: list[Record]) -> None:
    splits: dict[str, str] = {}
    for record in records:
        other = splits.setdefault(record.id, record.split)
        if other != record.split:
            raise UserError(f"image {record.id!r} is in --{other} and in --{record.split}; remove it from one of them")


def _hold_out(records: list[Record]) -> list[Record]:
    """A tenth of train becomes val: those whose ids have the smallest hashes, and one photo at least.

    A photo's split depends on its id, not on the order of the photos nor on those added later.
    """
    train = [record for record in records if record.split == "train"]
    hashes = {record.id: int(hashlib.sha256(record.id.encode()).hexdigest(), 16) for record in train}
    limit = max(2**256 // 10, min(hashes.values()))
    held_out = {id for id, hash in hashes.items() if hash <= limit}
    return [
        Record(record.image, record.id, "val", record.captions) if record.id in held_out else record
        for record in records
    ]


def _present(records: list[Record], folders: list[Path], allow_missing: float) -> tuple[list[Record], int]:
    """The records whose photo is on disk, in one of the image folders, and the number of the others."""
    roots = tuple(map(os.path.realpath, folders))
    files = functools.cache(functools.partial(_files, roots))
    present, missing = [], []
    for record in records:
        folder, name = os.path.split(record.image)
        inside = files(folder).get(name)
        if inside is False:
            raise UserError(f"{record.image}: a link that leads out of the image folder; put the photo itself there")
        (present if inside else missing).append(record)
    if len(missing) > allow_missing * len(records):
        share = len(missing) / len(records)
        raise UserError(
            f"{missing[0].image}: no such photo, and so for {len(missing):,} of {len(records):,} photos ({share:.1%}); "
            f"check the image folder, or do without them: --allow-missing {math.ceil(100 * share) / 100}"
        )
    return present, len(missing)


def _files(roots: tuple[str, ...], folder: str) -> dict[str, bool]:
    """The names of the files in a folder, and whether each lies in one of the roots, wherever symbolic links lead.

    One look at the folder, not one at each of 240,000 photos.
    """
    here = _inside(folder or ".", roots)
    try:
        with os.scandir(folder or ".") as entries:
            return {
                entry.name: _inside(entry.path, roots) if entry.is_symlink() else here
                for entry in entries
                if entry.is_file()
            }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None


def _inside(path: str, roots: tuple[str, ...]) -> bool:
    real = os.path.realpath(path)
    return any(os.path.commonpath([real, root]) == root for root in roots)


def _photos(records: list[Record], cut: Iterator[list[str]], tallies: dict[str, SplitStats]) -> Iterator[Photo]:
    """The records with their captions as words, counted. Captions without a word go, and photos without a caption."""
    for record in tqdm(records, "cutting captions", unit=" photos"):
        captions = tuple(tuple(words) for words in islice(cut, len(record.captions)) if words)
        if captions:
            photo = Photo(record.image, record.id, record.split, captions)
            tallies[record.split].add(photo)
            yield photo


def _vocabulary(config: Preprocess, train: SplitStats, language: str, tokenizer: str) -> Vocabulary:
    if not train.photos:
        source, *_ = config.karpathy or config.train or ["--scenes"]
        raise UserError(f"{source}: train is empty: no photo is on disk with a caption; check photos and captions")
    settings = dict(language=language, tokenizer=tokenizer, max_words=config.max_words)
    min_count = config.min_count or MIN_COUNT[language]
    vocabulary = Vocabulary.from_counts(train.words, min_count=min_count, **settings)
    if len(vocabulary) == len(SPECIAL):
        raise UserError(f"no word occurs {min_count} times in train; give a lower --min-count, or more captions")
    return vocabulary


@contextlib.contextmanager
def _draft_folder(data: Path) -> Iterator[Path]:
    """A folder in `data` for files that are not yet decided upon; it goes at the end, or with the next start."""
    folder = data / ".draft"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{data}: cannot be written to ({error.strerror}); give another folder") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(drafts: Path, data: Path, overwrite: bool) -> None:
    """Put the drafts in their places. What is there and differs is replaced only with `overwrite`.

    captions.jsonl goes first and comes last: a kill never leaves it beside a vocabulary of other captions. A vocabulary
    alone is what a kill has left, and is no reason to ask.
    """
    for name in (VOCABULARY_FILE, CAPTIONS_FILE) if (data / CAPTIONS_FILE).exists() else ():
        there = data / name
        if there.exists() and not filecmp.cmp(drafts / name, there, shallow=False):
            if not overwrite:
                raise UserError(f"{there}: made with other settings or annotations; replace it with --overwrite")
            (data / CAPTIONS_FILE).unlink()
            break
    for name in (VOCABULARY_FILE, CAPTIONS_FILE):
        os.replace(drafts / name, data / name)


def _print_left_out(records: list[Record], captions: int, missing: int, tallies: Iterable[SplitStats]) -> None:
    tallies = list(tallies)
    wordless = captions - sum(tally.lengths.total() for tally in tallies)
    bare = len(records) - sum(tally.photos for tally in tallies)
    if missing or wordless:
        print(
            f"left out: {missing:,} photos missing on disk; {wordless:,} captions without a word, "
            f"and with them {bare:,} photos"
        )


if __name__ == "__main__":
    run(Preprocess, main)
