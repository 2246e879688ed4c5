"""Every kind of file, truncated, zeroed, unreadable, of a future version, of another data set: one line names it.

No other file changes.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from captioning.features.feature_reader import FeatureReader
from preprocess.captions import CAPTIONS_FILE, read_captions, write_captions
from preprocess.vocabulary import Vocabulary
from tests.torture.artefacts import (
    ENCODER,
    EXTRACT,
    GENERATE,
    NOWHERE,
    PREPROCESS,
    READ_AIC,
    RESUME,
    SCENES,
    SCORE,
    TRAIN,
    make_artefacts,
    run_ok,
)
from tests.torture.commands import Outcome, bound_by_permissions, contents, run_command

READERS = {  # a file -> the commands that read it
    "aic.json": [READ_AIC, "generate.py --score results.json --references aic.json"],
    "coco.json": [f"{PREPROCESS} --train coco.json data/small/photos"],
    "karpathy.json": [f"{PREPROCESS} --karpathy karpathy.json data/small/photos"],
    "data/scenes/scenes.json": [SCENES],
    "data/small/captions.jsonl": [EXTRACT, f"{EXTRACT} --verify", TRAIN, f"{GENERATE} --data data/small", SCORE],
    "data/small/vocab.json": [TRAIN, SCORE],
    "data/small/features.h5": [
        EXTRACT,
        f"{EXTRACT} --info",
        f"{EXTRACT} --verify",
        TRAIN,
        f"{GENERATE} --data data/small",
    ],
    "data/small/features.encoder.pt": [EXTRACT, f"{EXTRACT} --verify", TRAIN],
    "checkpoints/att/best.pt": [
        f"{GENERATE} data/small/photos/0.png",
        f"{TRAIN} --start-from checkpoints/att",
        f"{GENERATE} data/small/photos/0.png --ensemble checkpoints/att/best.pt",
        "extract_features.py data/small --workers 0 --weights checkpoints/att --out new.h5",
    ],
    "checkpoints/att/last.pt": [RESUME],
    "checkpoints/att/log.jsonl": [
        RESUME,
        f"dashboard --replay checkpoints/att {NOWHERE}",
    ],
    "results.json": [SCORE],
    "vectors.vec": [f"{TRAIN} --word-vectors vectors.vec"],
    "vectors.vec.gz": [f"{TRAIN} --word-vectors vectors.vec.gz"],
    "weights.pth": [
        f"extract_features.py data/small {ENCODER} --weights weights.pth --out new.h5",
        f"{TRAIN} --fine-tune {ENCODER} --weights weights.pth",
    ],
    "data/small/photos/0.png": [f"{EXTRACT} --out new.h5", f"{GENERATE} data/small/photos/0.png"],
}
TEMPORARY = (".tmp", ".lock", ".draft")


@pytest.fixture
def files(artefacts, monkeypatch):
    """All the files in the current folder: path -> bytes."""
    artefacts.enter(monkeypatch)
    yield artefacts.files
    artefacts.restore()


@pytest.fixture
def restore(artefacts, files):
    """restore() repairs all files."""
    return artefacts.restore


def run_attacked(command: str) -> Outcome:
    """Run the command. Unless it succeeds, no existing file may change. No temporary file may remain."""
    before = contents()
    end = run_command(command)
    after = contents()
    assert end.status == 0 or before.items() <= after.items(), (command, before.items() - after.items())
    assert not [name for name in after.keys() - before.keys() if any(part in name for part in TEMPORARY)]
    return end


def is_one_line_that_names(end: Outcome, file: str) -> bool:
    return end.status == 1 and end.stderr.startswith("error: ") and "\n" not in end.stderr and file in end.stderr


def refused_or_said(file: str, command: str) -> bool:
    """Word vectors: a head of a file serves, and damaged lines are skipped, as the command says."""
    end = run_attacked(command)
    said = end.status == 0 and re.search(r"lines skipped|it is a head of|words \(100.0%\)", end.stdout)
    assert said or is_one_line_that_names(end, file), (command, end)
    return True


def refused(file: str, command: str) -> bool:
    end = run_attacked(command)
    assert is_one_line_that_names(end, file), (command, end)
    return True


# A fraction of the file; -1: all but its last byte.
CUTS = [0, 0.5, -1, *(twentieth / 20 for twentieth in range(1, 19) if twentieth != 10)]


@pytest.mark.parametrize("file", READERS)
def test_a_truncated_file_gives_one_line_that_names_it(files, restore, file, times, tally):
    count = 0
    for position in CUTS[: times(3, 20)]:
        content = files[Path(file)]
        cut = content[:-1] if position < 0 else content[: int(len(content) * position)]
        for command in READERS[file]:
            Path(file).write_bytes(cut)
            if (
                content == cut + b"\n"
                or file.endswith("log.jsonl")
                or (file.endswith(".png") and not 0 <= position < 0.9)
            ):
                end = run_attacked(command)  # the last bytes of a PNG and the log of a resumed run are not needed
                assert end.status == 0 or NOWHERE.split()[1] in end.stderr, (command, end)
            elif file.startswith("vectors"):
                refused_or_said(file, command)
            else:
                refused(file, command)
            restore()
            count += 1
    tally("files cut short", count)


@pytest.mark.parametrize("file", [name for name in READERS if not name.endswith((".h5", ".png"))])
def test_a_file_with_zeros_in_its_middle_gives_one_line_that_names_it(files, restore, file, tally):
    for share in (3, 100):  # the middle third, the middle hundredth
        for command in READERS[file]:
            content = bytearray(files[Path(file)])
            length = max(8, len(content) // share)
            start = (len(content) - length) // 2
            content[start : start + length] = bytes(length)
            Path(file).write_bytes(content)
            (refused_or_said if file.startswith("vectors") else refused)(file, command)
            restore()
    tally("files zeroed in the middle", 2 * len(READERS[file]))


def test_a_zeroed_photo_is_refused_or_skipped(files):
    path = Path("data/small/photos/0.png")
    path.write_bytes(files[path][:60] + bytes(len(files[path]) - 60))
    refused(str(path), READERS[str(path)][0])
    run_ok(f"{READERS[str(path)][0]} --allow-missing 0.1")
    assert Path("new.unreadable.txt").read_text(encoding="utf-8").startswith(f"{path}: ")


@pytest.mark.parametrize("damage", ["a third", "a page", "the means"])
def test_zeroed_features_are_found_by_verify_and_extracted_again(files, damage, tally):
    """Training does not check this: it would have to read every row twice."""
    path = Path("data/small/features.h5")
    block = FeatureReader(path).arrays["pooled" if damage == "the means" else "features"]
    start = block.offset + 9 * block.row_bytes
    length = {"a third": 8 * block.row_bytes, "a page": 4096, "the means": block.row_bytes}[damage]
    content = bytearray(files[path])
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    end = run_command(f"{EXTRACT} --verify")
    assert (
        is_one_line_that_names(end, str(path))
        and "such as that of photo9; they are now marked as not done" in end.stderr
    )
    run_ok(EXTRACT)
    np.testing.assert_allclose(rows(path), rows_of(files[path], path), rtol=1e-2, atol=1e-3)
    assert "24 of 24 rows are done and undamaged" in run_ok(f"{EXTRACT} --verify")
    tally("zeroed features found by --verify")


def rows(path: Path) -> np.ndarray:
    return FeatureReader(path).read_stored(np.arange(24)).astype(float)


def rows_of(content: bytes, path: Path) -> np.ndarray:
    copy = path.with_name("copy.h5")
    copy.write_bytes(content)
    return rows(copy)


def test_zeros_and_garbage_in_the_metadata_of_a_feature_file_give_a_result_or_one_line_at_once(files, times, tally):
    """HDF5 hung when its string heap was zeroed, so the file no longer has one."""
    path, random, count = Path("data/small/features.h5"), np.random.default_rng(0), times(40, 1000)
    spans = [(block.offset, block.offset + 24 * block.row_bytes) for block in FeatureReader(path).arrays.values()]
    first, last = min(spans)[0], max(spans)[1]
    positions = [position for position in (*range(first), *range(last, len(files[path]))) if files[path][position]]
    for attack in range(count):
        content = bytearray(files[path])
        start, length = int(random.choice(positions)), int(random.choice([1, 8, 64, 512]))
        end = min(start + length, first if start < first else len(content))
        content[start:end] = bytes(end - start) if attack % 2 else random.bytes(end - start)
        path.write_bytes(content)
        end = run_attacked(f"{EXTRACT} --info")
        assert end.status == 0 or is_one_line_that_names(end, str(path)), (start, length, end)
    tally("damaged descriptions of features.h5", count)


@pytest.mark.parametrize("file", READERS)
def test_a_folder_in_place_of_a_file_gives_one_line(files, restore, file, tally):
    for command in READERS[file]:
        Path(file).unlink()
        Path(file).mkdir()
        refused(file, command)
        restore()
    tally("folders in the place of files", len(READERS[file]))


@pytest.mark.parametrize("file", READERS)
def test_a_file_without_permission_gives_one_line(files, restore, file, tally):
    for command in READERS[file]:
        before = contents()
        Path(file).chmod(0)
        with bound_by_permissions():
            end = run_command(command)
        Path(file).chmod(0o644)
        assert is_one_line_that_names(end, file) and "Permission denied" in end.stderr, (command, end)
        assert before.items() <= contents().items()
        restore()
    tally("files without permission", len(READERS[file]))


def of_the_future(file: Path) -> None:
    """Write it as a later version might."""
    if file.suffix == ".h5":
        with h5py.File(file, "r+") as features:
            features.attrs["format"] = "kantu features 2"
    elif file.suffix == ".pt":
        torch.save({**torch.load(file, weights_only=True), "format": "kantu checkpoint 2"}, file)
    elif file.suffix == ".jsonl":
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        changed = [{**line, "event": "round"} if "event" in line else {**line, "boxes": []} for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in changed), encoding="utf-8")
    else:
        file.write_text(
            json.dumps({"format": 2, "content": json.loads(file.read_text(encoding="utf-8"))}), encoding="utf-8"
        )


@pytest.mark.parametrize("file", [name for name in READERS if name.endswith((".h5", ".pt", "l", ".json"))])
def test_a_file_of_a_future_version_is_one_line(files, file, tally):
    of_the_future(Path(file))
    for command in READERS[file]:
        refused(file, command)
    tally("files of a future version", len(READERS[file]))


# ---- of another data set


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same files of other photos, in Chinese."""
    folder = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_artefacts(scenes=False)
        data = Path("data/small")
        photos = [type(p)(p.image, f"x{p.id}", p.split, (("一只", "狗"),)) for p in read_captions(data)]
        write_captions(data / CAPTIONS_FILE, photos)
        words = [photo.captions[0] for photo in photos]
        Vocabulary.build(words, language="zh", tokenizer="jieba", min_count=1, max_words=9).save(data / "vocab.json")
        run_ok(f"{EXTRACT} --overwrite --image-size 96")
        run_ok(f"{TRAIN.replace('--run new', '--run att')} --overwrite")
        run_ok(f"{GENERATE} --data data/small --json results.json")
    return folder


@pytest.mark.parametrize(
    "file, commands, words",
    [
        ("data/small/captions.jsonl", [EXTRACT], "features.h5: belongs to another data set: none of its 24"),
        (
            "data/small/captions.jsonl",
            [TRAIN, f"{GENERATE} --data data/small"],
            "features.h5: belongs to another data set",
        ),
        ("data/small/vocab.json", [TRAIN], "vocab.json: lacks 100% of the words in captions.jsonl"),
        ("data/small/features.h5", [EXTRACT], "features.h5: was extracted with"),
        (
            "data/small/features.h5",
            [TRAIN, f"{GENERATE} --data data/small"],
            "features.h5: belongs to another data set",
        ),
        ("data/small/features.h5", [f"{EXTRACT} --verify"], "features.h5: belongs to another data set"),
        (
            "data/small/features.encoder.pt",
            [TRAIN, f"{EXTRACT} --verify"],
            "features.encoder.pt: is not the encoder of",
        ),
        (
            "checkpoints/att/best.pt",
            [f"{TRAIN} --start-from checkpoints/att"],
            "checkpoints/att: was trained with another",
        ),
        ("checkpoints/att/last.pt", [RESUME], "checkpoints/att: was trained with another vocabulary (6 words; data"),
        ("results.json", [SCORE], "image_ids fit no photo: xphoto5"),
    ],
)
def test_a_file_of_another_data_set_gives_one_line(files, other, file, commands, words, tally):
    shutil.copy(other / file, file)
    for command in commands:
        end = run_attacked(command)
        assert is_one_line_that_names(end, words), (command, end)
    tally("files of another data set", len(commands))


def test_captions_truncated_at_the_end_of_a_line_are_noticed_if_there_are_features(files):
    """Without features beside them, or with --features, nothing shows the loss."""
    path = Path("data/small/captions.jsonl")
    path.write_bytes(b"".join(files[path].splitlines(True)[:-3]))
    for command in (TRAIN, f"{GENERATE} --data data/small"):
        end = run_attacked(command)
        assert is_one_line_that_names(end, f"{path}: lacks 3 of the 24 photos of data/small/features.h5"), end
        assert "--features data/small/features.h5" in end.stderr
        run_ok(f"{command} --features data/small/features.h5")
    assert "the data set has changed: the rows of 21 photos are kept" in run_attacked(EXTRACT).stdout


def test_a_changed_bit_in_a_checkpoint_is_found(files, times, tally):
    path, random, count = Path("checkpoints/att/best.pt"), np.random.default_rng(1), times(20, 300)
    found = 0
    for _ in range(count):
        content = bytearray(files[path])
        content[random.integers(len(content))] ^= 1 << int(random.integers(8))
        path.write_bytes(content)
        end = run_attacked(f"{GENERATE} data/small/photos/0.png")
        found += end.status == 1
        assert end.status == 0 or is_one_line_that_names(end, str(path)), end
    assert found > 0.9 * count  # the others are in the gaps between the archive's members, or in their names
    tally("changed bits in checkpoints", count)


def test_a_checkpoint_without_its_training_state_is_not_resumed(files):
    shutil.copy("checkpoints/att/best.pt", "checkpoints/att/last.pt")
    refused("checkpoints/att/last.pt: a checkpoint without optimizer; start another --run from its best.pt", RESUME)


def test_the_encoder_file_beside_the_features_is_not_accepted_as_a_run(files):
    command = GENERATE.replace("checkpoints/att", "data/small/features.encoder.pt")
    refused("features.encoder.pt: a checkpoint without config; give a run in checkpoints/", f"{command} a.jpg")
