"""Captions for photos, folders and splits; scores; attention pictures.

python generate.py checkpoints/att photo.jpg folder/
python generate.py checkpoints/att photo.jpg --pictures attention/
python generate.py checkpoints/att photo.jpg --num-captions 3 --beam-groups 3 --beam-size 6
python generate.py checkpoints/att photo.jpg --num-captions 3 --temperature 0.7 --top-p 0.9
python generate.py checkpoints/att --data data/aic --split val --json captions.json --scores scores.json
python generate.py --score captions.json others.json --references data/aic
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.signals import install_exit_handlers  # before torch, which takes seconds to load

    install_exit_handlers()

import re
from collections.abc import Iterator
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioning.caption import CaptionResult
from captioning.captioner import Captioner
from captioning.dataset.caption_dataset import check_none_lost, photos_of
from captioning.encoders.images import PHOTO_ENDINGS, FailureLimit, in_batches, open_photo, photo_batches
from captioning.errors import UserError
from captioning.evaluation.metrics import NAMES
from captioning.evaluation.results import (
    read_captioned,
    read_photos,
    write_coco,
    write_csv,
    write_json,
    write_submission,
)
from captioning.evaluation.score_report import Pairs, Scores, compare, format_comparison, score_captions
from captioning.features.feature_cache import FeatureReader
from captioning.runtime.command_line import one_line, run
from captioning.runtime.device import oom_as_user_error
from captioning.runtime.settings import as_plain_data
from captioning.viewing.attention_plots import animate_attention, draw_attention
from captioning.viewing.html_report import extremes, write_page
from config import Generate
from preprocess.captions import Photo, read_captions

FILES = ("json", "submission", "csv", "html", "extremes", "scores")  # settings that name a file to write


def main(config: Generate) -> None:
    if config.score:
        score_files(config)
    else:
        caption_photos(config)


def caption_photos(config: Generate) -> None:
    captioner = Captioner.load(config.run, config.device, config.precision, config.hard, config.ensemble)
    torch.manual_seed(config.seed)
    refuse_what_it_cannot_do(config, captioner)
    language, tokenizer = captioner.vocabulary.language, captioner.vocabulary.tokenizer
    pairs, scores = captions_of_all(config, captioner), None
    if config.data and (config.scores or config.csv or config.html or config.extremes):
        scores = score_captions(pairs, language, tokenizer, java=bool(config.scores))
    if config.scores:
        print(scores)
    write_files(config, pairs, language, scores)


def captions_of_all(config: Generate, captioner: Captioner) -> Pairs:
    """Every photo that could be read with its caption, which is said or drawn at once where that was asked for."""
    listed = list(read_captions(config.data)) if config.data else []
    photos = photos_of(listed, config.split, config.data, config.limit) if config.data else chosen_files(config.photos)
    reader = cached_features(config, captioner, listed) if config.data else None
    unreadable, pairs = FailureLimit(len(photos), config.allow_missing), []
    for photo, caption in caption_all(config, captioner, reader, photos, unreadable):
        pairs.append((photo, caption))
        if not output_files(config):
            name = one_line(photo.id)
            tqdm.write(f"{name}: {said(caption)}")
            for other in caption.others:
                tqdm.write(f"{' ' * len(name)}  {said(other)}")
        if config.pictures:
            draw_picture(config, photo, caption)
    for reason in unreadable.reasons:
        print(f"skipped: {one_line(reason)}")
    if not pairs:
        raise UserError("none of the photos could be read; give others")
    return pairs


def said(caption: CaptionResult) -> str:
    return caption.text + ("" if caption.finished else " [unfinished]")


def refuse_what_it_cannot_do(config: Generate, captioner: Captioner) -> None:
    if config.pictures and not captioner.decoder.uses_attention:
        raise UserError(f"--pictures: the decoder {captioner.decoder_name} of {config.run} does not attend")
    if config.submission and captioner.vocabulary.language != "zh":
        raise UserError(f"--submission: AI Challenger is Chinese, and {config.run} writes English; give --json")


def score_files(config: Generate) -> None:
    """Scores of captions that anyone made; of two files, also which is better."""
    photos, language, tokenizer = read_photos(config.references, config.split, config.tokenizer)
    found = [read_captioned(path, photos, tokenizer) for path in config.score]
    if [photo.id for photo, _ in found[0]] != [photo.id for photo, _ in found[-1]]:
        raise UserError(
            f"{config.score[0]}, {config.score[1]}: captions of different photos; compare those of the same"
        )
    if len(found[0]) < len(photos):
        print(f"{config.score[0]}: has {len(found[0]):,} of the {len(photos):,} photos; the others are left out")
    tables = [score_captions(pairs, language, tokenizer) for pairs in found]
    for path, table in zip(config.score, tables, strict=True):
        print(f"{path}\n{table}\n")
    if len(tables) == 1:
        write_files(config, found[0], language, tables[0])
        return
    comparison = compare(*tables)
    print(f"{config.score[1]} - {config.score[0]}\n{format_comparison(comparison)}")
    if config.scores:
        write_scores(
            config,
            {str(path): table.to_dict() for path, table in zip(config.score, tables, strict=True)}
            | {"difference": comparison},
        )


def output_files(config: Generate) -> list[Path]:
    return [path for name in FILES if (path := getattr(config, name))]


def write_files(config: Generate, pairs: Pairs, language: str, scores: Scores | None) -> None:
    """Everything that was asked for but pictures. scores: where there are references."""
    ciders = scores.per_caption[:, NAMES.index("CIDEr-D")].tolist() if scores else [None] * len(pairs)
    cards = [(photo, caption, cider) for (photo, caption), cider in zip(pairs, ciders, strict=True)]
    title = " ".join(str(part) for part in (config.run, *config.score, config.data, config.references) if part)
    if config.json:
        write_coco(config.json, pairs)
    if config.submission:
        write_submission(config.submission, pairs)
    if config.csv:
        write_csv(config.csv, pairs, scores.per_caption if scores else None)
    if config.html:
        write_page(config.html, title, language, [("", cards)])
    if config.extremes:
        write_page(config.extremes, title, language, extremes(cards))
    if config.scores:
        write_scores(config, scores.to_dict())
    for path in output_files(config):
        print(f"{path}: {len(pairs):,} captions")


def chosen_files(paths: tuple[Path, ...]) -> list[Photo]:
    """The photos themselves, and those in folders, in order of their names."""
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in PHOTO_ENDINGS)
            if not inside:
                raise UserError(f"{path}: no photos in it ({' '.join(sorted(PHOTO_ENDINGS))})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such photo or folder")
    return [Photo(str(path), str(path), split="", captions=()) for path in dict.fromkeys(found)]


def caption_all(
    config: Generate, captioner: Captioner, reader: FeatureReader | None, photos: list[Photo], unreadable: FailureLimit
) -> Iterator[tuple[Photo, CaptionResult]]:
    """Each photo once, in order: from cached features where there are any of the run's encoder, else from the photo."""
    if reader:
        rows = reader.rows_of(photo.id for photo in photos)
        there = reader.present(rows, config.allow_missing, config.data)
        photos, rows = [*compress(photos, there)], rows[there]
    with tqdm(total=len(photos), unit="photo", desc="caption", disable=len(photos) < 2) as bar:
        batches = (
            from_cache(captioner, reader, photos, rows, config)
            if reader
            else from_files(captioner, photos, config, unreadable)
        )
        for batch in batches:
            yield from batch
            bar.update(len(batch))


def from_cache(captioner: Captioner, reader: FeatureReader, photos: list[Photo], rows: np.ndarray, config: Generate):
    read = reader.read if captioner.decoder.uses_attention else reader.read_pooled
    for batch, where in zip(*(in_batches(part, config.batch_size) for part in (photos, rows)), strict=True):
        captions = captioner.caption_grid(read(where), config.search)
        yield list(zip(batch, captions, strict=True))


def from_files(captioner: Captioner, photos: list[Photo], config: Generate, unreadable: FailureLimit):
    plan = in_batches(range(len(photos)), config.batch_size)
    workers = config.workers if len(plan) > 1 else 0
    for batch in photo_batches([photo.image for photo in photos], plan, captioner.encoder.transform, workers):
        unreadable.add(batch.failures)
        if batch.indices:
            captions = captioner.caption_squashed(batch.photos, config.search)
            yield list(zip([photos[i] for i in batch.indices], captions, strict=True))


def cached_features(config: Generate, captioner: Captioner, listed: list[Photo]) -> FeatureReader | None:
    """The feature file, where it is of the run's encoder. One that was named must be; another is said and left.

    listed: all of captions.jsonl.
    """
    path = config.features or config.data / "features.h5"
    if not config.features and not path.exists():
        print(f"{path}: not there; encoding the photos")
        return None
    reader = FeatureReader(path)
    if not config.features:
        rows = reader.rows_of(photo.id for photo in listed)
        check_none_lost(rows, path, len(reader.ids), config.allow_missing)
    if reader.attributes["weights_sha256"] == captioner.encoder_sha256:
        return reader
    made_by = (
        f"made by {reader.attributes['encoder']} ({reader.attributes['weights']}), not by the encoder of {config.run}"
    )
    if config.features:
        raise UserError(f"{path}: {made_by}; leave out --features to encode the photos")
    print(f"{path}: {made_by}; encoding the photos")
    return None


def draw_picture(config: Generate, photo: Photo, caption: CaptionResult) -> None:
    ending, draw = (".gif", animate_attention) if config.animate else (".png", draw_attention)
    name = re.sub(r"[^\w.-]+", "_", photo.id).strip("._") or "photo"
    path = config.pictures / (name + ending)
    attention = caption.attention.numpy()
    try:
        draw(open_photo(photo.image), caption.words, attention, caption.grid, path, caption.text, config.view)
    except LookupError as error:  # no font on this machine has the caption's characters
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, or draw elsewhere") from None


def write_scores(config: Generate, table: dict) -> None:
    """The table, with the settings that made it."""
    captioned, scored = ("run", "ensemble", "data", "split", "search"), ("score", "references", "split")
    settings = as_plain_data(config)
    write_json(config.scores, {**table, **{name: settings[name] for name in (captioned if config.run else scored)}})


def work(config: Generate) -> None:
    with oom_as_user_error(f"lower --batch-size {config.batch_size}, or --beam-size {config.search.beam_size}"):
        main(config)


if __name__ == "__main__":
    run(Generate, work)
