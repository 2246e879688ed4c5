"""Caption photos, folders or a split of a data set; score captions; draw their attention.

python generate.py checkpoints/att photo.jpg folder/
python generate.py checkpoints/att photo.jpg --pictures attention/
python generate.py checkpoints/att photo.jpg --num-captions 3 --beam-groups 3 --beam-size 6
python generate.py checkpoints/att photo.jpg --num-captions 3 --temperature 0.7 --top-p 0.9
python generate.py checkpoints/att --data data/aic --split val --json captions.json --scores scores.json
python generate.py checkpoints/att --data data/aic --split test --sort least-certain --html doubtful.html
python generate.py --score captions.json others.json --references data/aic
"""

from __future__ import annotations

if __name__ == "__main__":
    from captioning.runtime.start import start_command  # before torch, which takes seconds to load

    start_command()

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from captioning.caption import CaptionResult
from captioning.captioner import Captioner
from captioning.dataset.caption_dataset import photos_in_split
from captioning.encoders.images import FailureLimit, open_photo
from captioning.errors import UserError
from captioning.evaluation.metrics import METRICS
from captioning.evaluation.photo_names import PhotoFinder, check_found, read_image_info
from captioning.evaluation.results import (
    read_reference_photos,
    read_results,
    write_coco,
    write_csv,
    write_json,
    write_submission,
)
from captioning.evaluation.score_report import CaptionedPhotos, Scores, compare, format_comparison, score_captions
from captioning.features.feature_files import FeatureFiles
from captioning.photo_grids import available_rows, cached_grids, encoded_grids, open_matching_features
from captioning.runtime.command_line import one_line, run
from captioning.runtime.device import oom_as_user_error
from captioning.runtime.files import write_errors
from captioning.runtime.loader import lost_worker_as_user_error
from captioning.runtime.photo_formats import is_photo
from captioning.runtime.progress import tqdm
from captioning.runtime.settings import as_plain_data, non_default
from captioning.viewing.attention_plots import CaptionedImage, animate_attention, draw_attention
from captioning.viewing.html_report import ReportEntry, worst_and_best, write_page
from config import Generate
from preprocess.captions import Photo, read_captions, read_texts
from preprocess.folders import has_photo_ending, walk
from preprocess.user_dictionary import read_user_dictionary

OUTPUT_SETTINGS = ("json", "submission", "csv", "html", "extremes", "scores")  # settings that name a file to write
# settings that are written with the scores
RECORDED_SETTINGS = ("run", "ensemble", "data", "split", "views", "search", "min_probability")
RECORDED_SCORE_SETTINGS = ("score", "references", "split")  # the same, with --score

MAX_PICTURE_NAME = 50  # characters of a photo's id in the name of its picture: at most 200 of the 255 bytes

CaptionedPhoto = tuple[Photo, CaptionResult]


def main(config: Generate) -> None:
    """Score files of captions, or caption photos."""
    if config.score:
        score_files(config)
    else:
        caption_photos(config)


# ---- captioning


def caption_photos(config: Generate) -> None:
    """Caption photos, score the captions if there are references, and write the requested files."""
    captioner = Captioner.load(
        config.run, config.device, config.precision, config.hard, config.ensemble, config.cuda_graphs, config.trust
    )
    torch.manual_seed(config.seed)
    check_supported(config, captioner)
    captioned, failures = caption_all(config, captioner)
    captioned = select(config, captioned)
    language = captioner.vocabulary.language
    scores = None
    if config.data and (config.scores or config.csv or config.html or config.extremes):
        texts = read_texts(config.data, [photo.id for photo, _ in captioned]) if language == "en" else None
        tokenizer = captioner.vocabulary.tokenizer_text
        scores = score_captions(captioned, language, tokenizer, bool(config.scores), texts)
    if config.scores:
        print(scores)
    write_outputs(config, captioned, language, scores)
    failures.check()  # after all captions that there are have been written


def check_supported(config: Generate, captioner: Captioner) -> None:
    """Raise UserError if the run cannot produce a requested output."""
    if config.pictures and not captioner.decoder.uses_attention:
        raise UserError(
            f"--pictures: the decoder {captioner.decoder_name} of {config.run} has no attention; leave out --pictures"
        )
    if config.submission and captioner.vocabulary.language != "zh":
        raise UserError(f"--submission: AI Challenger is Chinese, but {config.run} writes English; give --json")
    check_calibrated(config, captioner)


def check_calibrated(config: Generate, captioner: Captioner) -> None:
    """Raise UserError if a requested output needs probabilities and captions get none; say so if they get none."""
    selecting = non_default(config, "sort", "min_probability")
    needing = selecting + non_default(config.search, "choose", "samples")
    if needing and captioner.calibration is None:
        raise UserError(
            f"{needing[0]}: {config.run} is not calibrated; run: python -m captioning.calibrate {config.run}"
        )
    obstacle = captioner.probability_obstacle(config.search, config.views)
    if obstacle is None or captioner.calibration is None:
        return
    if selecting:
        raise UserError(f"{selecting[0]}: {obstacle}; give the same settings, or calibrate it with these")
    print(f"no probabilities: {obstacle}")


def caption_all(config: Generate, captioner: Captioner) -> tuple[list[CaptionedPhoto], FailureLimit]:
    """Caption all photos. Print each caption, unless it goes to a file, and draw its picture if requested.

    Photos that cannot be read are reported at the end, and returned. Raises UserError if none can be read.
    """
    if config.data:
        dataset = list(read_captions(config.data))
        photos = photos_in_split(dataset, config.split, config.data, config.limit)
        ids = [photo.id for photo in dataset]
        files = open_matching_features(
            captioner, config.run, config.data, ids, config.features, config.views, config.allow_missing
        )
    else:
        photos = find_photos(config.photos)
        files = None
        if config.image_info:
            photos = with_ids(photos, config.image_info)
    if config.pictures:
        check_pictures(config, photos)
    failures = FailureLimit(len(photos), config.allow_missing)
    captioned = []
    for photo, caption in iterate_captions(config, captioner, files, photos, failures):
        captioned.append((photo, caption))
        if not output_files(config) and not selects(config):
            print_caption(photo, caption)
        if config.pictures:
            draw_picture(config, photo, caption)
    for failure in failures.reasons:
        print(f"skipped: {one_line(failure)}")
    if not captioned:
        raise UserError(f"{next(iter(failures.reasons))}; none of {len(photos)} photos can be read: give others")
    return captioned, failures


def selects(config: Generate) -> bool:
    """Whether captions are sorted or left out once all are there."""
    return bool(non_default(config, "sort", "min_probability"))


def select(config: Generate, captioned: list[CaptionedPhoto]) -> list[CaptionedPhoto]:
    """Sort and leave out captions by their probability, and print those that stay if no file is written.

    Raises UserError if none stays.
    """
    if not selects(config):
        return captioned
    if config.sort == "least-certain":
        captioned = sorted(captioned, key=lambda pair: probability_of(pair[1]))
    kept = [pair for pair in captioned if probability_of(pair[1]) >= config.min_probability]
    if not kept:
        highest = max(probability_of(caption) for _, caption in captioned)
        raise UserError(
            f"--min-probability {config.min_probability}: the highest of {len(captioned):,} captions is "
            f"{highest:.2f}; give less"
        )
    if not output_files(config):
        for photo, caption in kept:
            print_caption(photo, caption)
    if len(kept) < len(captioned):
        left_out = len(captioned) - len(kept)
        print(f"left out {left_out:,} of {len(captioned):,} captions below --min-probability {config.min_probability}")
    return kept


def probability_of(caption: CaptionResult) -> float:
    """The probability of a caption of a calibrated run."""
    assert caption.probability is not None
    return caption.probability


def find_photos(paths: tuple[Path, ...]) -> list[Photo]:
    """The given photos, and those in the given folders, sorted by path. Each photo occurs once."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += photos_below(path)
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: no such photo or folder")
    return [Photo(str(path), str(path), split="", captions=()) for path in dict.fromkeys(files)]


def with_ids(photos: list[Photo], image_info: Path) -> list[Photo]:
    """The photos with the ids of --image-info. Raises UserError unless each photo has one, of its own."""
    finder = PhotoFinder(read_image_info(image_info))
    matches = {photo.image: finder.find_file(photo.image) for photo in photos}
    check_found(image_info, "photos", "image", matches, "give the file of this folder")
    named = [replace(photo, id=matches[photo.image].photos[0].id) for photo in photos]
    id, count = Counter(photo.id for photo in named).most_common(1)[0]
    if count > 1:
        raise UserError(f"{image_info}: {count} of the photos have the id {id}; give each photo once")
    return named


def photos_below(root: Path) -> list[Path]:
    """The photos in a folder and those below it, by their content or else their ending. Prints what is passed over."""
    hidden: list[str] = []
    photos, others = [], []
    for folder, _, names in walk(str(root), hidden):
        for name in names:
            file = Path(folder, name)
            (photos if has_photo_ending(name) or is_photo(file) else others).append(file)
    for kind, passed_over in (("files that are no photos", others), ("hidden files and folders", hidden)):
        if passed_over:
            print(one_line(f"{root}: {len(passed_over):,} {kind} passed over, such as {passed_over[0]}"))
    if not photos:
        raise UserError(f"{root}: contains no photos; give another folder, or photos")
    return sorted(photos)


def iterate_captions(
    config: Generate, captioner: Captioner, files: FeatureFiles | None, photos: list[Photo], failures: FailureLimit
) -> Iterator[CaptionedPhoto]:
    """Caption each photo once, in order, from its cached features or, without feature files, from its own file."""
    if files:
        photos, rows = available_rows(files, photos, config.data, config.views, config.allow_missing)
        batches = cached_grids(captioner, files, photos, rows, config.batch_size)
    else:
        batches = encoded_grids(captioner, photos, config.batch_size, config.views, config.workers, failures)
    with tqdm(total=len(photos), unit="photo", desc="caption", disable=len(photos) < 2) as bar:
        for batch, grids in batches:
            yield from zip(batch, captioner.caption_views(grids, config.search), strict=True)
            bar.update(len(batch))


def print_caption(photo: Photo, caption: CaptionResult) -> None:
    """Print the caption after the photo's name, and further captions of the photo below."""
    name = one_line(photo.id)
    tqdm.write(f"{name}: {display_text(caption)}")
    for other in caption.others:
        tqdm.write(f"{' ' * len(name)}  {display_text(other)}")


def display_text(caption: CaptionResult) -> str:
    """The caption, marked if it is unfinished, and its probability."""
    text = caption.text if caption.finished else f"{caption.text} [unfinished]"
    return text if caption.probability is None else f"{text} ({caption.probability:.0%})"


def draw_picture(config: Generate, photo: Photo, caption: CaptionResult) -> None:
    """Draw the caption's attention into the folder of --pictures. Raises UserError if that fails."""
    draw = animate_attention if config.animate else draw_attention
    path = picture_path(config, photo)
    attention = caption.attention.numpy()
    image = open_photo(photo.image)
    captioned = CaptionedImage(image, caption.text, caption.words, attention, caption.grid, evidence=caption.evidence)
    try:
        with write_errors(path, "free space or give another folder"):
            draw(captioned, path, config.view)
    except LookupError as error:  # no installed font has the caption's characters
        raise UserError(str(error)) from None


def picture_path(config: Generate, photo: Photo) -> Path:
    """Where a photo's picture is written. No two photos have the same: a name that is not the whole id has its hash."""
    name = re.sub(r"[^\w.-]+", "_", photo.id).strip("._")[:MAX_PICTURE_NAME]
    if name != photo.id or not name:
        name = f"{name or 'photo'}-{hashlib.sha256(os.fsencode(photo.id)).hexdigest()[:8]}"
    return config.pictures / (name + (".gif" if config.animate else ".png"))


def check_pictures(config: Generate, photos: list[Photo]) -> None:
    """Raise UserError if a picture would replace a photo."""
    files = {os.path.realpath(photo.image) for photo in photos}
    for photo in photos:
        path = picture_path(config, photo)
        if os.path.realpath(path) in files:
            raise UserError(f"--pictures {config.pictures}: {path} is one of the photos; give another folder")


# ---- scoring


def score_files(config: Generate) -> None:
    """Score one file of captions, or score two and compare them."""
    user_dictionary = read_user_dictionary(config.user_dict) if config.user_dict else ()
    references = read_reference_photos(config.references, config.split, config.tokenizer, user_dictionary)
    captioned = [read_results(path, references) for path in config.score]
    check_same_photos(config.score, captioned)
    num_captions = len(captioned[0])
    num_photos = len(references.photos)
    if num_captions < num_photos:
        print(f"{config.score[0]}: has {num_captions:,} of the {num_photos:,} photos; the others are not scored")
    language = references.language
    scores = [score_captions(pairs, language, references.tokenizer_text, texts=references.texts) for pairs in captioned]
    for path, path_scores in zip(config.score, scores, strict=True):
        print(f"{path}\n{path_scores}\n")
    if len(scores) == 1:
        write_outputs(config, captioned[0], language, scores[0])
    else:
        compare_files(config, *scores)


def check_same_photos(paths: tuple[Path, ...], captioned: list[list[CaptionedPhoto]]) -> None:
    """Raise UserError if two files caption different photos."""
    first, last = ([photo.id for photo, _ in pairs] for pairs in (captioned[0], captioned[-1]))
    if first != last:
        raise UserError(
            f"{paths[0]}, {paths[1]}: have captions of different photos; compare captions of the same photos"
        )


def compare_files(config: Generate, first: Scores, second: Scores) -> None:
    """Print which of two files has the better captions, and write both scores and the comparison."""
    comparison = compare(first, second)
    first_path, second_path = config.score
    print(f"{second_path} - {first_path}\n{format_comparison(comparison)}")
    if config.scores:
        table = {str(first_path): first.to_dict(), str(second_path): second.to_dict(), "difference": comparison}
        write_scores(config, table)


# ---- output files


def output_files(config: Generate) -> list[Path]:
    """The files that the settings ask for, without --pictures."""
    paths = [getattr(config, name) for name in OUTPUT_SETTINGS]
    return [path for path in paths if path]


def write_outputs(config: Generate, captioned: CaptionedPhotos, language: str, scores: Scores | None) -> None:
    """Write all requested files. scores: None if the photos have no references."""
    if config.json:
        write_coco(config.json, captioned)
    if config.submission:
        write_submission(config.submission, captioned)
    if config.csv:
        write_csv(config.csv, captioned, scores.per_caption if scores else None)
    if config.html or config.extremes:
        write_reports(config, captioned, language, scores)
    if config.scores:
        write_scores(config, scores.to_dict())
    for path in output_files(config):
        print(f"{path}: {len(captioned):,} captions")


def write_reports(config: Generate, captioned: CaptionedPhotos, language: str, scores: Scores | None) -> None:
    """Write the HTML pages of --html and --extremes."""
    title = " ".join(str(part) for part in (config.run, *config.score, config.data, config.references) if part)
    if scores:
        ciders = scores.per_caption[:, METRICS.index("CIDEr-D")].tolist()
    else:
        ciders = [None] * len(captioned)
    entries = [ReportEntry(photo, caption, cider) for (photo, caption), cider in zip(captioned, ciders, strict=True)]
    if config.html:
        write_page(config.html, title, language, [("", entries)])
    if config.extremes:
        write_page(config.extremes, title, language, worst_and_best(entries))


def write_scores(config: Generate, table: dict[str, Any]) -> None:
    """Write the table with the settings that determine it."""
    settings = as_plain_data(config)
    names = RECORDED_SETTINGS if config.run else RECORDED_SCORE_SETTINGS
    write_json(config.scores, {**table, **{name: settings[name] for name in names}})


def work(config: Generate) -> None:
    """`main`, with a message if memory runs out."""
    remedy = f"lower --batch-size {config.batch_size}, or --beam-size {config.search.beam_size}"
    with lost_worker_as_user_error(), oom_as_user_error(remedy):
        main(config)


if __name__ == "__main__":
    run(Generate, work)
