"""Stage 1a: annotation files -> data/NAME/captions.jsonl, vocab.json and, in English, texts.jsonl.

python -m preprocess data/aic --train ANN.json IMAGES --val ANN.json IMAGES
python -m preprocess data/coco --karpathy dataset_coco.json IMAGES
python -m preprocess data/flickr8k --source flickr8k                          (any form of docs/data.md)
python -m preprocess data/scenes --scenes 2000 --language zh                  (needs no download)
python -m preprocess data/aic --check --features features.h5                  (what looks wrong in a data set)
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command

    start_command()

import contextlib
import filecmp
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from captioning.errors import UserError
from captioning.runtime.command_line import run
from captioning.runtime.files import locked
from captioning.runtime.library_errors import reason
from captioning.runtime.progress import tqdm
from config import Preprocess
from preprocess.annotations import Annotations, LeftOut, Record, read_annotations
from preprocess.captions import CAPTIONS_FILE, TEXTS_FILE, Photo, stored_path, write_captions, write_texts
from preprocess.columns import Columns
from preprocess.folders import SPLITS
from preprocess.languages import LANGUAGES, default_tokenizer, detect_language, is_cut_by_hand
from preprocess.left_out import LEFT_OUT_FILE, WORDLESS, check_left_out, left_out_lines, write_left_out
from preprocess.photos import Located, locate_photos, with_unique_ids
from preprocess.report import SplitStats, split_table, vocabulary_line
from preprocess.sources import read_source
from preprocess.splits import assign_splits, check_splits
from preprocess.tokenizers import tokenize_all
from preprocess.user_dictionary import read_user_dictionary
from preprocess.vocabulary import SPECIAL, VOCABULARY_FILE, Vocabulary


def main(config: Preprocess) -> None:
    """Preprocess, with the data folder locked, or check what was preprocessed before."""
    if config.check:
        from captioning.doctor.checkup import check_data  # torch is needed only here

        check_data(config.data, config.features, config.allow_missing)
        return
    with locked(config.data, config.data / ".lock"):
        preprocess(config)


def preprocess(config: Preprocess) -> None:
    """Write captions.jsonl, vocab.json and, in English, texts.jsonl, and print a summary. Raises UserError."""
    started = time.monotonic()
    user_dictionary = read_user_dictionary(config.user_dict) if config.user_dict else ()
    photos, left_out = _read_photos(config)
    existing = [photo.record for photo in photos if photo.file]
    missing = [LeftOut(photo.record.image, "no such photo", "photo") for photo in photos if not photo.file]
    left_out += missing
    check_left_out(left_out, existing, config.allow_missing)
    captions = list(chain.from_iterable(record.captions for record in existing))
    language = config.language or detect_language(captions)
    tokenizer = config.tokenizer or _find_tokenizer(captions, language, user_dictionary)
    stats = {split: SplitStats() for split in SPLITS}
    with _draft_folder(config.data) as drafts:
        with contextlib.closing(tokenize_all(captions, tokenizer, config.workers, user_dictionary)) as tokenized:
            write_captions(drafts / CAPTIONS_FILE, _tokenized_photos(config.data, existing, tokenized, stats, left_out))
        vocabulary = _build_vocabulary(config, stats["train"], language, tokenizer, user_dictionary)
        vocabulary.save(drafts / VOCABULARY_FILE)
        if language == "en":
            write_texts(drafts / TEXTS_FILE, existing)
        _publish(drafts, config.data, config.overwrite)
    write_left_out(config.data, left_out)
    print(
        f"{config.data}: language {language}, tokenizer {vocabulary.tokenizer_text}, {time.monotonic() - started:.1f} s"
    )
    print(split_table(stats, vocabulary))
    print(vocabulary_line(stats["train"].words, vocabulary, config.max_words))
    _print_left_out(stats, len(missing), len(existing), len(captions))
    if listed := left_out_lines(left_out):
        print(f"left out, listed in {config.data / LEFT_OUT_FILE}:", *listed, sep="\n  ")
    print(f"next: python extract_features.py {config.data}")


# ---- records


def _read_photos(config: Preprocess) -> tuple[list[Located], list[LeftOut]]:
    """The photos that the command line asks for, with unique ids and splits, and what the annotations hold besides."""
    if config.scenes:
        from preprocess.scenes import draw_scenes  # numpy and Pillow are needed only here

        records = draw_scenes(config.data, config.scenes, config.language or "zh", config.seed, config.scene_set)
        return locate_photos(records, [config.data]), []
    columns = Columns(config.image_column, config.caption_column)
    if config.source:
        found, folders = read_source(config.source, config.images, config.data / "photos", columns)
    else:
        found, folders = _read_files(config, columns)
    photos = locate_photos(with_unique_ids(found.records), folders)
    check_splits(photos)
    if not config.val and not config.karpathy and not any(photo.record.split == "val" for photo in photos):
        photos = [replace(photo, record=_without_train(photo.record)) for photo in photos]
    photos = assign_splits(photos, config.val_share, config.test_share)
    return photos, found.left_out


def _read_files(config: Preprocess, columns: Columns) -> tuple[Annotations, list[Path]]:
    """The annotations of --karpathy, or of --train, --val and --test, and their image folders."""
    found, folders = Annotations(), []
    for split in ("karpathy", *SPLITS):
        if source := getattr(config, split):
            file, images = source
            annotations = read_annotations(file, images, None if split == "karpathy" else split, columns)
            found.records += annotations.records
            found.left_out += annotations.left_out
            folders.append(images)
    if config.karpathy and not all(record.split for record in found.records):
        raise UserError(f"{config.karpathy[0]}: names no splits; use --source {config.karpathy[0]}, or --train")
    return found, folders


def _without_train(record: Record) -> Record:
    """The record without a split if it is of train: a part of train becomes val."""
    return replace(record, split="") if record.split == "train" else record


# ---- captions and vocabulary


def _tokenized_photos(
    data: Path,
    records: list[Record],
    tokenized: Iterator[list[str]],
    stats: Mapping[str, SplitStats],
    left_out: list[LeftOut],
) -> Iterator[Photo]:
    """Yield the records with tokenized captions, and add them to the statistics.

    data: the folder of captions.jsonl. tokenized: the words of every caption of the records, in order. Captions without
    words, and photos without captions, are left out, and added to `left_out`.
    """
    for record in tqdm(records, "tokenizing captions", unit=" photos"):
        all_captions = [tuple(words) for words in islice(tokenized, len(record.captions))]
        captions = tuple(filter(None, all_captions))
        for text, words in zip(record.captions, all_captions, strict=True):
            if not words:
                left_out.append(LeftOut(f"{record.image} ({text[:60]!r})", WORDLESS, "caption"))
        if captions:
            photo = Photo(stored_path(record.image, str(data)), record.id, record.split, captions)
            stats[record.split].add(photo)
            yield photo


def _find_tokenizer(captions: list[str], language: str, user_dictionary: tuple[str, ...]) -> str:
    """The tokenizer of the language, or that which keeps the spaces of captions that are cut by hand."""
    if user_dictionary or not is_cut_by_hand(captions, language):
        return default_tokenizer(language)
    print(
        f"the captions are cut by spaces, which are kept: --tokenizer whitespace; give --tokenizer "
        f"{default_tokenizer(language)} to cut them anew"
    )
    return "whitespace"


def _build_vocabulary(
    config: Preprocess, train: SplitStats, language: str, tokenizer: str, user_dictionary: tuple[str, ...]
) -> Vocabulary:
    """The vocabulary of the train split. Raises UserError if it has no photos, or no word occurs often enough."""
    if not train.photos:
        source, *_ = config.karpathy or config.train or [config.source or "--scenes"]
        raise UserError(f"{source}: train is empty: no photo is on disk with a caption; check photos and captions")
    _check_words(config, train, language, tokenizer)
    min_count = config.min_count or LANGUAGES[language].min_count
    vocabulary = Vocabulary.from_counts(
        train.words,
        language=language,
        tokenizer=tokenizer,
        min_count=min_count,
        max_words=config.max_words,
        user_dictionary=user_dictionary,
    )
    if len(vocabulary) == len(SPECIAL):
        raise UserError(f"no word occurs {min_count} times in train; give a lower --min-count, or more captions")
    return vocabulary


def _check_words(config: Preprocess, train: SplitStats, language: str, tokenizer: str) -> None:
    """Raise UserError if the tokenizer does not seem to split the captions: most of them are one word.

    Labels of one word are accepted if --tokenizer is given and the words are no longer than words are.
    """
    is_long = train.mean_letters > LANGUAGES[language].max_mean_letters
    if 2 * train.lengths[1] <= train.captions or (config.tokenizer and not is_long):
        return
    problem = f"{config.data}: most captions are a single {'long ' if is_long else ''}word"
    others = [name for name in (default_tokenizer(language), "character") if name != tokenizer]
    remedy = f"give --tokenizer {' or '.join(others)}"
    if not is_long:
        remedy += f", or --tokenizer {tokenizer} if they are to be single words"
    raise UserError(f"{problem}: the tokenizer {tokenizer} does not split them; {remedy}")


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

    captions.jsonl is removed first and written last, so that a kill never leaves it with the vocabulary or the texts of
    other captions. A vocabulary without captions.jsonl is left over from a kill and may be replaced.
    """
    names = [name for name in (VOCABULARY_FILE, TEXTS_FILE, CAPTIONS_FILE) if (drafts / name).exists()]
    if (data / CAPTIONS_FILE).exists():
        changed = [name for name in names if _differs(drafts / name, data / name)]
        if changed and not overwrite:
            raise UserError(
                f"{data / changed[0]}: made with other settings or annotations; replace it with --overwrite"
            )
        if changed:
            (data / CAPTIONS_FILE).unlink()
    if TEXTS_FILE not in names:
        (data / TEXTS_FILE).unlink(missing_ok=True)  # of captions in another language
    for name in names:
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
