"""Captions for photos, folders and splits; scores; attention pictures.

python generate.py checkpoints/att photo.jpg folder/
python generate.py checkpoints/att photo.jpg --pictures attention/
python generate.py checkpoints/att --data data/aic --split val --json captions.json --scores scores.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from captioning.captioner import Captioned, Captioner
from captioning.feature_cache import FeatureReader
from captioning.images import PHOTO_ENDINGS, PhotoError, Unreadable, in_batches, open_photo, photo_batches
from captioning.metrics import format_table, score_table
from captioning.pictures import draw_attention
from captioning.splits import photos_of
from command_line import run
from config import Generate, UserError
from preprocess.captions import Photo, read_captions
from preprocess.files import draft


@dataclass(frozen=True)
class Asked:
    """A photo to caption: where it is, and what it is called in what we write."""

    path: str
    id: str


def main(config: Generate) -> None:
    captioner = Captioner.load(config.run, config.device, config.precision, config.hard)
    if config.pictures and not captioner.decoder.sees_cells:
        raise UserError(f"--pictures: the decoder {captioner.decoder_name} of {config.run} does not attend")
    photos = photos_of(list(read_captions(config.data)), config.split, config.data, config.limit) if config.data else []
    asked = [Asked(photo.image, photo.id) for photo in photos] or chosen_files(config.photos)
    unreadable = Unreadable(len(asked), config.allow_missing)
    captioned: dict[str, Captioned] = {}
    for photo, caption in caption_all(config, captioner, photos, asked, unreadable):
        captioned[photo.id] = caption
        if not (config.json or config.scores):
            tqdm.write(f"{photo.id}: {caption.text}{'' if caption.finished else ' [unfinished]'}")
        if config.pictures:
            draw_picture(config.pictures, photo, caption)
    for reason in unreadable.reasons:
        print(f"skipped: {reason}")
    if config.json:
        write_json(config.json, [result(id, caption) for id, caption in captioned.items()])
        print(f"{config.json}: {len(captioned):,} captions")
    if config.scores:
        write_scores(config, captioner, photos, captioned)


def result(id: str, caption: Captioned) -> dict:
    """A line of COCO's results; with a sentinel also the words, and how much of each came from language alone."""
    line = {"image_id": coco_id(id), "caption": caption.text}
    if caption.sentinel is not None:
        line |= {"words": caption.words, "sentinel": [round(beta, 4) for beta in caption.sentinel]}
    return line


def chosen_files(paths: tuple[Path, ...]) -> list[Asked]:
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
    return [Asked(str(path), str(path)) for path in dict.fromkeys(found)]


def caption_all(
    config: Generate, captioner: Captioner, photos: list[Photo], asked: list[Asked], unreadable: Unreadable
) -> Iterator[tuple[Asked, Captioned]]:
    """Each photo once, in order: from cached features where there are any of the run's encoder, else from the photo."""
    reader = cached_features(config, captioner) if config.data else None
    if reader:
        there = {photo.id for photo in reader.present(photos, config.allow_missing, config.data)}
        asked = [photo for photo in asked if photo.id in there]
    with tqdm(total=len(asked), unit="photo", desc="caption", disable=len(asked) < 2) as bar:
        batches = (
            from_cache(captioner, reader, asked, config) if reader
            else from_files(captioner, asked, config, unreadable)
        )  # fmt: skip
        for batch in batches:
            yield from batch
            bar.update(len(batch))


def from_cache(captioner: Captioner, reader: FeatureReader, asked: list[Asked], config: Generate):
    read = reader.read if captioner.decoder.sees_cells else reader.read_pooled
    for batch in in_batches(asked, config.batch_size):
        grid = read(np.array([reader.rows[photo.id] for photo in batch]))
        captions = captioner.caption_grid(grid, config.beam_size, config.max_length, config.length_penalty)
        yield list(zip(batch, captions, strict=True))


def from_files(captioner: Captioner, asked: list[Asked], config: Generate, unreadable: Unreadable):
    plan = in_batches(range(len(asked)), config.batch_size)
    workers = config.workers if len(plan) > 1 else 0
    for batch in photo_batches([photo.path for photo in asked], plan, captioner.encoder.transform, workers):
        unreadable.add(batch.failures)
        if batch.indices:
            search = config.beam_size, config.max_length, config.length_penalty
            captions = captioner.caption_squashed(batch.photos, *search)
            yield list(zip([asked[i] for i in batch.indices], captions, strict=True))


def cached_features(config: Generate, captioner: Captioner) -> FeatureReader | None:
    """The feature file, where it is of the run's encoder. One that was named must be; another is said and left."""
    path = config.features or config.data / "features.h5"
    if not config.features and not path.exists():
        print(f"{path}: not there; encoding the photos")
        return None
    reader = FeatureReader(path)
    if reader.attributes["weights_sha256"] == captioner.encoder_sha256:
        return reader
    made_by = (
        f"made by {reader.attributes['encoder']} ({reader.attributes['weights']}), not by the encoder of {config.run}"
    )
    if config.features:
        raise UserError(f"{path}: {made_by}; leave out --features to encode the photos")
    print(f"{path}: {made_by}; encoding the photos")
    return None


def draw_picture(folder: Path, photo: Asked, caption: Captioned) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^\w.-]+", "_", photo.id).strip("._") + ".png")
    try:
        draw_attention(
            open_photo(photo.path), caption.words, caption.attention.numpy(), caption.grid, path, caption.text
        )
    except LookupError as error:  # no font on this machine has the caption's characters
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, or draw elsewhere") from None


def coco_id(id: str) -> int | str:
    """COCO's ids are numbers."""
    return int(id) if id.isdecimal() and str(int(id)) == id else id


def write_scores(config: Generate, captioner: Captioner, photos: list[Photo], captioned: dict[str, Captioned]) -> None:
    candidates = {id: caption.words for id, caption in captioned.items()}
    references = {photo.id: photo.captions for photo in photos if photo.id in captioned}
    table = score_table(candidates, references, captioner.vocabulary.language, captioner.vocabulary.tokenizer)
    print(format_table(table))
    unfinished = sum(not caption.finished for caption in captioned.values())
    write_json(config.scores, {**table, "run": str(config.run), "data": str(config.data), "split": config.split,
                               "beam_size": config.beam_size, "length_penalty": config.length_penalty,
                               "unfinished": unfinished})  # fmt: skip
    print(f"{config.scores}: scores of {len(captioned):,} photos, beam {config.beam_size}, {unfinished} unfinished")


def write_json(path: Path, data: object) -> None:
    with draft(path) as file:
        json.dump(data, file, ensure_ascii=False, indent=1)


def work(config: Generate) -> None:
    try:
        main(config)
    except PhotoError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run(Generate, work)
