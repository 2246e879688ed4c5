"""A table of mistakes with the exact line that each gives; ... in a line stands for what differs between machines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
import torch

from captioning.runtime import command_line
from captioning.viewing import fonts
from tests.torture.artefacts import (
    ENCODER,
    EXTRACT,
    GENERATE,
    NOWHERE,
    PREPROCESS,
    READ_AIC,
    RESUME,
    SCORE,
    TRAIN,
)
from tests.torture.commands import COMMANDS, run_command

ROOT = Path(__file__).parents[2]
AIC = f"{PREPROCESS} --train a.json data/small/photos"
KARPATHY = f"{PREPROCESS} --karpathy a.json data/small/photos"
FRESH = "extract_features.py data/small --workers 0 --out new.h5"
PHOTO = f"{GENERATE} data/small/photos/0.png"
SCORE_R = "generate.py --score r.json --references data/small"
ENTRIES = [{"image_id": "0.png", "caption": ["a"]}, {"image_id": "1.png", "caption": ["b"]}]
LINE = {"image": "data/small/photos/0.png", "id": "photo0", "split": "train", "captions": [["a"]]}
WORDS = ["<pad>", "<unk>", "<start>", "<end>", "a"]


def put(name: str, content: object) -> Callable[[], None]:
    """Return a function that writes a file: bytes and text as they are, anything else as JSON."""

    def do() -> None:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    return do


def save(name: str, content: object) -> Callable[[], None]:
    def do() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, name)

    return do


def entry(**changes: object) -> Callable[[], None]:
    """AI Challenger annotations with one entry changed."""
    return put("a.json", [ENTRIES[1], {**ENTRIES[0], **changes}])


def coco(**changes: object) -> Callable[[], None]:
    form = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    return put("a.json", {**form, **changes})


def karpathy(**changes: object) -> Callable[[], None]:
    return put("a.json", {"images": [{"filename": "0.png", "split": "train", "sentences": [{"raw": "a"}], **changes}]})


def captions(**changes: object) -> Callable[[], None]:
    return put("data/small/captions.jsonl", json.dumps({**LINE, **changes}) + "\n")


def vocabulary(**changes: object) -> Callable[[], None]:
    content = {"language": "en", "tokenizer": "whitespace", "min_count": 1, "words": WORDS}
    return put("data/small/vocab.json", {**content, **changes})


def without(attribute: str) -> Callable[[], None]:
    def do() -> None:
        with h5py.File("data/small/features.h5", "r+") as file:
            del file.attrs[attribute]

    return do


def gone(name: str) -> Callable[[], None]:
    return lambda: Path(name).unlink()


def folder(name: str) -> Callable[[], None]:
    return lambda: Path(name).mkdir()


TABLE = [  # the mistake, how it is made, the command, its line
    ("annotations that are not there", None, AIC, "a.json: no such file; check the path"),
    (
        "an empty file",
        put("a.json", ""),
        AIC,
        "a.json: not of a known form: found an empty file; the known forms are ...",
    ),
    (
        "a text",
        put("a.json", "hello"),
        AIC,
        "a.json: not of a known form: found text whose first line is 'hello'; the known forms are ...",
    ),
    (
        "JSON in UTF-16",
        put("a.json", "[]".encode("utf-16")),
        AIC,
        "a.json: not of a known form: found an empty list; the known forms are ...",
    ),
    (
        "a file still packed",
        put("a.json", b"\x1f\x8b\x08\x00"),
        AIC,
        "a.json: neither UTF-8 nor UTF-16 nor GB18030 text; give a text file, or save it as UTF-8",
    ),
    (
        "brackets without end",
        put("a.json", "[" * 100000),
        AIC,
        "a.json: not JSON (maximum recursion depth exceeded while decoding a JSON array from a unicode "
        "string); download or unpack it again",
    ),
    (
        "a number",
        put("a.json", "7"),
        AIC,
        "a.json: not of a known form: found a JSON int; the known forms are ...",
    ),
    (
        "an empty list",
        put("a.json", []),
        AIC,
        "a.json: not of a known form: found an empty list; the known forms are ...",
    ),
    (
        "an empty object",
        put("a.json", {}),
        AIC,
        "a.json: not of a known form: found an empty object; the known forms are ...",
    ),
    (
        "COCO's instances",
        coco(annotations=[{"image_id": 1, "bbox": [0]}]),
        AIC,
        "a.json: annotation 0 has no caption; give captions_*.json, not instances_*.json",
    ),
    (
        "results for annotations",
        put("a.json", [{"image_id": 1, "caption": "a"}]),
        AIC,
        "a.json: holds no photo with a caption: entry 0: the photo's name is '1', not text; give a file with captions",
    ),
    (
        "a number for an id",
        entry(image_id=7),
        AIC,
        "a.json: entry 1: the photo's name is '7', not text; 1 of 2 photos (50.0%) are missing or unusable; "
        "check the annotations and the image folder, or leave them out with --allow-missing 0.5",
    ),
    (
        "no captions",
        entry(caption=[]),
        AIC,
        "a.json: entry 1 ('data/small/photos/0.png'): no caption; 1 of 2 photos (50.0%) are missing or "
        "unusable; check the annotations and the image folder, or leave them out with --allow-missing 0.5",
    ),
    (
        "empty captions",
        entry(caption=["", " "]),
        AIC,
        "a.json: entry 1 ('data/small/photos/0.png'): no caption; 1 of 2 photos (50.0%) are missing or "
        "unusable; check the annotations and the image folder, or leave them out with --allow-missing 0.5",
    ),
    (
        "a number for a caption",
        entry(caption=[7]),
        AIC,
        "a.json: entry 1 ('data/small/photos/0.png'): no caption; 1 of 2 photos (50.0%) are missing or "
        "unusable; check the annotations and the image folder, or leave them out with --allow-missing 0.5",
    ),
    (
        "a photo outside the folder",
        entry(image_id="../x.png"),
        AIC,
        "a.json: entry 1: '../x.png', '../x.png': not a path in the image folder; correct or remove the entry",
    ),
    (
        "an absolute path",
        entry(image_id="/etc/passwd"),
        AIC,
        "a.json: entry 1: '/etc/passwd', '/etc/passwd': not a path in the image folder; correct or remove the entry",
    ),
    (
        "an id twice",
        entry(image_id="1.png"),
        AIC,
        "a.json: image id '1.png' occurs twice; keep one entry with all its captions",
    ),
    (
        "a photo that is not there",
        entry(image_id="none.png"),
        AIC,
        "data/small/photos/none.png: no such photo; 1 of 2 photos (50.0%) are missing or unusable; check the "
        "annotations and the image folder, or leave them out with --allow-missing 0.5",
    ),
    (
        "a line break in an id",
        entry(image_id="no\nne.png"),
        AIC,
        "data/small/photos/no\\nne.png: no such photo; 1 of 2 photos (50.0%) are missing or unusable; check "
        "the annotations and the image folder, or leave them out with --allow-missing 0.5",
    ),
    (
        "captions without a word",
        put("a.json", [{**line, "caption": ["!"]} for line in ENTRIES]),
        AIC,
        "a.json: train is empty: no photo is on disk with a caption; check photos and captions",
    ),
    (
        "another form after --karpathy",
        put("a.json", ENTRIES),
        KARPATHY,
        "a.json: names no splits; use --source a.json, or --train",
    ),
    (
        "an unknown split",
        karpathy(split="other"),
        KARPATHY,
        "a.json: holds no photo with a caption: image 0: split 'other' is none of train, val, test, restval, "
        "validation, valid, dev; give a file with captions",
    ),
    (
        "no split",
        karpathy(split=None),
        KARPATHY,
        "a.json: holds no photo with a caption: image 0: no 'split'; give a file with captions",
    ),
    (
        "a sentence that is a text",
        karpathy(sentences=["a"]),
        KARPATHY,
        "a.json: holds no photo with a caption: image 0 ('data/small/photos/0.png'): no caption; give a file "
        "with captions",
    ),
    (
        "a filepath outside the folder",
        karpathy(filepath="../.."),
        KARPATHY,
        "a.json: image 0: '0.png', '../../0.png': not a path in the image folder; correct or remove the entry",
    ),
    (
        "no photo to train on",
        karpathy(split="val"),
        KARPATHY,
        "a.json: train is empty: no photo is on disk with a caption; check photos and captions",
    ),
    (
        "a caption of an unlisted image",
        coco(annotations=[{"image_id": 2, "caption": "a"}]),
        AIC,
        "a.json: holds no photo with a caption: annotation 0: belongs to image '2', which 'images' does not "
        "list; give a file with captions",
    ),
    (
        "no file name",
        coco(images=[{"id": 1}]),
        AIC,
        "a.json: holds no photo with a caption: image 0: no name of a photo; give a file with captions",
    ),
    ("no images", coco(images=[], annotations=[]), AIC, "a.json: holds no images; give a file with captions"),
    (
        "no image folder",
        put("a.json", ENTRIES),
        f"{PREPROCESS} --train a.json nowhere",
        "nowhere: no such image folder; give the folder that holds the photos of a.json",
    ),
    (
        "a file for the image folder",
        put("a.json", ENTRIES),
        f"{PREPROCESS} --train a.json a.json",
        "a.json: no such image folder; give the folder that holds the photos of a.json",
    ),
    (
        "file and folder swapped",
        put("a.json", ENTRIES),
        f"{PREPROCESS} --train data/small/photos a.json",
        "a.json: no such image folder; give the folder that holds the photos of data/small/photos",
    ),
    (
        "the same file for train and val",
        put("a.json", ENTRIES),
        AIC + " --val a.json data/small/photos",
        "data/small/photos/0.png: the same photo is in train (as '0.png') and in val (as '0.png'); remove it "
        "from one of them",
    ),
    (
        "no source of captions",
        None,
        "preprocess data/read",
        "give exactly one of --source PATH, --train FILE IMAGES, --karpathy JSON IMAGES, --scenes N",
    ),
    (
        "--val without --train",
        None,
        "preprocess data/read --scenes 20 --val a.json b",
        "--val and --test require --train FILE IMAGES",
    ),
    ("too few scenes", None, "preprocess data/read --scenes 2", "--scenes 2: must be 10 or more"),
    (
        "a minimum count that no word has",
        put("a.json", [{**entry, "caption": ["a dog"]} for entry in ENTRIES]),
        AIC.replace("--min-count 1", "--min-count 9"),
        "no word occurs 9 times in train; give a lower --min-count, or more captions",
    ),
    ("a minimum count of 0", None, AIC.replace("--min-count 1", "--min-count 0"), "--min-count 0: must be 1 or more"),
    ("a share above 1", None, AIC + " --allow-missing 2", "--allow-missing 2.0: must be a fraction between 0 and 1"),
    (
        "an unknown language",
        None,
        AIC + " --language fr",
        "--language fr: must be one of en, ja, th, zh; see --help",
    ),
    (
        "no data folder",
        None,
        "preprocess",
        "PATH is required (folder to write, such as data/aic); see --help",
    ),
    (
        "other captions there already",
        None,
        READ_AIC.replace("data/read", "data/small"),
        "data/small/vocab.json: made with other settings or annotations; replace it with --overwrite",
    ),
    (
        "a file for the data folder",
        None,
        READ_AIC.replace("data/read", "aic.json"),
        "aic.json: cannot be written to (Not a directory); give another folder",
    ),
    # captions
    (
        "no captions.jsonl",
        gone("data/small/captions.jsonl"),
        EXTRACT,
        "data/small/captions.jsonl: no such file; make it with: python -m preprocess data/small",
    ),
    (
        "a line that is a list",
        put("data/small/captions.jsonl", "[]\n"),
        EXTRACT,
        "data/small/captions.jsonl:1: not an object with the keys image, id, split, captions; correct it",
    ),
    (
        "an unknown split in captions.jsonl",
        captions(split="dev"),
        EXTRACT,
        "data/small/captions.jsonl:1: split 'dev' is none of train, val, test; correct it",
    ),
    (
        "an empty id",
        captions(id=""),
        EXTRACT,
        "data/small/captions.jsonl:1: image and id must be text, and not empty; correct it",
    ),
    (
        "a photo without captions",
        captions(captions=[]),
        EXTRACT,
        "data/small/captions.jsonl:1: captions must be a list of at least one caption; correct or remove it",
    ),
    (
        "an empty word",
        captions(captions=[[""]]),
        EXTRACT,
        "data/small/captions.jsonl:1: a caption must be a list of at least one word, none of them empty; "
        "correct or remove it",
    ),
    (
        "a number for a word",
        captions(captions=[[7]]),
        EXTRACT,
        "data/small/captions.jsonl:1: a word is not text; correct or remove it",
    ),
    (
        "a photo twice in captions.jsonl",
        put("data/small/captions.jsonl", (json.dumps(LINE) + "\n") * 2),
        EXTRACT,
        "data/small/captions.jsonl:2: id 'photo0' occurs twice; remove one of its lines",
    ),
    (
        "no photos to validate",
        captions(),
        TRAIN + " --features data/small/features.h5",
        "data/small: has no val photos, only train; create them with: python -m preprocess data/small",
    ),
    (
        "a split without photos",
        None,
        GENERATE + " --data data/small --split test",
        "data/small: has no test photos, only train, val; create them with: python -m preprocess data/small",
    ),
    (
        "no such data set for train.py",
        None,
        TRAIN.replace("data/small", "data/none"),
        "data/none/vocab.json: no vocabulary; make it with: python -m preprocess data/none",
    ),
    (
        "no such data set for extract_features.py",
        None,
        EXTRACT.replace("data/small", "data/none"),
        "data/none/captions.jsonl: no such file; make it with: python -m preprocess data/none",
    ),
    # vocabulary
    (
        "no vocab.json",
        gone("data/small/vocab.json"),
        TRAIN,
        "data/small/vocab.json: no vocabulary; make it with: python -m preprocess data/small",
    ),
    (
        "a vocabulary that is a list",
        put("data/small/vocab.json", []),
        TRAIN,
        "data/small/vocab.json: not a vocabulary (an object with the keys language, tokenizer, min_count, "
        "words, words a list); make it with: python -m preprocess data/small",
    ),
    (
        "a vocabulary of an unknown language",
        vocabulary(language="fr"),
        TRAIN,
        "data/small/vocab.json: not a vocabulary: language 'fr' is none of en, zh, ja, th; make it with: "
        "python -m preprocess data/small",
    ),
    (
        "an unknown tokenizer",
        vocabulary(tokenizer="bpe"),
        TRAIN,
        "data/small/vocab.json: not a vocabulary: tokenizer 'bpe' is none of jieba, whitespace, character, "
        "fugashi, pythainlp; "
        "make it with: python -m preprocess data/small",
    ),
    (
        "no special words",
        vocabulary(words=["a"]),
        TRAIN,
        "data/small/vocab.json: not a vocabulary: the first words are not <pad> <unk> <start> <end>; make it "
        "with: python -m preprocess data/small",
    ),
    (
        "a word twice",
        vocabulary(words=WORDS + ["a"]),
        TRAIN,
        "data/small/vocab.json: not a vocabulary: a word occurs twice; make it with: python -m preprocess data/small",
    ),
    (
        "a word that is a number",
        vocabulary(words=WORDS + [7]),
        TRAIN,
        "data/small/vocab.json: not a vocabulary: a word is not text, or is empty; make it with: python"
        " -m preprocess data/small",
    ),
    (
        "another vocabulary than that of the run",
        vocabulary(words=WORDS + ["square"]),
        RESUME,
        "checkpoints/att: was trained with another vocabulary (11 words; data/small has 6); start a new --run",
    ),
    # photos
    (
        "a photo that is a text",
        put("x.jpg", "hello"),
        GENERATE + " x.jpg",
        "x.jpg: not an image; none of 1 photos can be read: give others",
    ),
    (
        "an empty photo",
        put("x.jpg", ""),
        GENERATE + " x.jpg",
        "x.jpg: not an image; none of 1 photos can be read: give others",
    ),
    ("no such photo", None, GENERATE + " x.jpg", "x.jpg: no such photo or folder"),
    (
        "a folder without photos",
        folder("empty"),
        GENERATE + " empty",
        "empty: contains no photos; give another folder, or photos",
    ),
    ("a dead link", lambda: os.symlink("nowhere", "x.png"), GENERATE + " x.png", "x.png: no such photo or folder"),
    (
        "a photo gone since preprocess",
        gone("data/small/photos/3.png"),
        EXTRACT + " --out new.h5",
        "data/small/photos/3.png: no such file; 1 of 24 photos cannot be read, more than --allow-missing "
        "0.01: repair them, or raise the limit",
    ),
    # features
    (
        "no features",
        gone("data/small/features.h5"),
        TRAIN,
        "data/small/features.h5: no such file; create it with: python extract_features.py DATA",
    ),
    (
        "features that are a text",
        put("data/small/features.h5", "hello"),
        TRAIN,
        "data/small/features.h5: cannot be read as a Kantu feature file (file signature not found); check its"
        " permissions, or extract again with --overwrite",
    ),
    (
        "features without their native grid",
        without("native_grid"),
        TRAIN,
        "data/small/features.h5: cannot be read as a Kantu feature file (no native_grid); check its "
        "permissions, or extract again with --overwrite",
    ),
    (
        "features without their weights' sha256",
        without("weights_sha256"),
        TRAIN,
        "data/small/features.h5: cannot be read as a Kantu feature file (no weights_sha256); check its "
        "permissions, or extract again with --overwrite",
    ),
    (
        "features of another image size",
        None,
        EXTRACT.replace("--image-size 64", "--image-size 96"),
        "data/small/features.h5: was extracted with image_size 64, not 96; give --overwrite to replace it, or "
        "--out for another file",
    ),
    (
        "features of another grid",
        None,
        EXTRACT + " --grid native",
        "data/small/features.h5: was extracted with grid 14, not native; give --overwrite to replace it, or --out "
        "for another file",
    ),
    (
        "features of another type",
        None,
        EXTRACT + " --dtype float32",
        "data/small/features.h5: was extracted with dtype float16, not float32; give --overwrite to replace it, or"
        " --out for another file",
    ),
    (
        "features without their encoder",
        gone("data/small/features.encoder.pt"),
        TRAIN,
        "data/small/features.encoder.pt: the encoder of data/small/features.h5 is missing; extract again with"
        " --overwrite",
    ),
    (
        "--info of no file",
        None,
        EXTRACT + " --info --out none.h5",
        "none.h5: no such file; create it with: python extract_features.py DATA",
    ),
    (
        "--features of no file",
        None,
        TRAIN + " --features none.h5",
        "none.h5: no such file; create it with: python extract_features.py DATA",
    ),
    # encoders
    (
        "an unknown encoder",
        None,
        FRESH + " --encoder resnet9 --weights random",
        "--encoder resnet9: not a torchvision classifier; did you mean resnet...",
    ),
    (
        "an unknown layer",
        None,
        FRESH + " --encoder resnet18.layer9 --weights random",
        "--encoder resnet18.layer9: no layer 'layer9' (it has conv1, bn1, relu, maxpool, layer1, layer2, "
        "layer3, layer4, avgpool, fc); try resnet101 or mobilenet_v2",
    ),
    (
        "photos too small for the encoder",
        None,
        FRESH + " --encoder inception_v3 --weights random --image-size 32",
        "--image-size 32: too small for inception_v3 (Calculated padded input size per channel: (1 x 1))",
    ),
    ("photos of 16 pixels", None, FRESH + " --image-size 16", "--image-size 16: must be 32 or more"),
    (
        "no such weights",
        None,
        FRESH + " --weights none.pth",
        "--weights none.pth: no such file or run; give imagenet, pretrained, random, a state-dict file or "
        "checkpoints/RUN",
    ),
    (
        "weights that are a text",
        put("x.pth", "hello"),
        FRESH + " --weights x.pth",
        "x.pth: not a state dict that can be read safely, or damaged (KeyError); save model.state_dict() there",
    ),
    (
        "weights that are a list",
        save("x.pth", [1]),
        FRESH + " --weights x.pth",
        "--weights x.pth: holds no state dict; save model.state_dict() there",
    ),
    (
        "no weights in the file",
        save("x.pth", {}),
        FRESH + " --weights x.pth",
        "--weights x.pth: holds no state dict; save model.state_dict() there",
    ),
    (
        "weights of another encoder",
        save("x.pth", {"a": torch.zeros(1)}),
        FRESH + " --weights x.pth --encoder resnet18",
        "--weights x.pth: not of resnet18 (missing: conv1.weight, bn1.weight, bn1.bias and 97 more); give the "
        "--encoder they belong to",
    ),
    (
        "a run's weights and an encoder",
        None,
        FRESH + " --weights checkpoints/att --encoder resnet18",
        "--weights checkpoints/att: a run has its own --encoder, --image-size and --pooled; leave those out",
    ),
    (
        "no such run for --weights",
        None,
        FRESH + " --weights checkpoints/none/best.pt",
        "checkpoints/none/best.pt: no such run; the runs are the folders in checkpoints/",
    ),
    (
        "a GPU that is not there",
        None,
        EXTRACT + " --device cuda:7",
        "--device cuda:7: not on this machine, which has cpu",
    ),
    (
        "a device that does not exist",
        None,
        EXTRACT + " --device gpu",
        "--device gpu: not on this machine, which has cpu",
    ),
    (
        "--nvjpeg without a GPU",
        None,
        EXTRACT + " --nvjpeg --device cpu --out new.h5",
        "--nvjpeg: decodes on a CUDA GPU, but this extraction runs on cpu; leave it out",
    ),
    (
        "--nvjpeg with --scaled-decoding",
        None,
        EXTRACT + " --nvjpeg --scaled-decoding",
        "--scaled-decoding cannot be combined with --nvjpeg, which decodes JPEGs at full size",
    ),
    (
        "--info with --verify",
        None,
        EXTRACT + " --info --verify",
        "--info describes the file and --verify checks it: give one of them",
    ),
    ("a batch of none", None, EXTRACT + " --batch-size 0", "--batch-size 0: must be 1 or more"),
    ("fewer than no workers", None, EXTRACT + " --workers -1", "--workers -1: must be 0 or more"),
    # checkpoints
    (
        "no such run",
        None,
        "generate.py checkpoints/none a.jpg",
        "checkpoints/none: no such run; the runs are the folders in checkpoints/",
    ),
    (
        "a run without checkpoints",
        folder("checkpoints/empty"),
        "generate.py checkpoints/empty a.jpg",
        "checkpoints/empty: no best.pt or last.pt in it; train a run with: python train.py DATA --run empty",
    ),
    (
        "a checkpoint that is a text",
        put("checkpoints/x/best.pt", "hello"),
        "generate.py checkpoints/x a.jpg",
        "checkpoints/x/best.pt: not a Kantu checkpoint, or damaged (KeyError); give a run in checkpoints/",
    ),
    (
        "a state dict for a checkpoint",
        save("checkpoints/x/best.pt", {"w": torch.zeros(1)}),
        "generate.py checkpoints/x a.jpg",
        "checkpoints/x/best.pt: not a checkpoint of this version of Kantu (format None, not 'kantu checkpoint"
        " 1'); update Kantu, or give a run in checkpoints/",
    ),
    (
        "a photo for a run",
        None,
        "generate.py data/small/photos/0.png a.jpg",
        "data/small/photos/0.png: not a Kantu checkpoint, or damaged (Weights only load failed); give a run "
        "in checkpoints/",
    ),
    (
        "no such run for --ensemble",
        None,
        PHOTO + " --ensemble checkpoints/none",
        "checkpoints/none: no such run; the runs are the folders in checkpoints/",
    ),
    (
        "--hard with soft attention",
        None,
        PHOTO + " --hard argmax",
        "--hard argmax: needs a run of --decoder hard-attention, but this is attention",
    ),
    (
        "a run that is there already",
        None,
        TRAIN.replace("--run new", "--run att"),
        "checkpoints/att: already exists; continue it with --resume, or replace it with --overwrite",
    ),
    (
        "--resume with another size",
        None,
        RESUME.replace("--hidden-size 24", "--hidden-size 25"),
        "--hidden-size 25: checkpoints/att was trained with 24; resume with that, or name a new --run",
    ),
    (
        "--start-from a run of another size",
        None,
        TRAIN.replace("--hidden-size 24", "--hidden-size 25") + " --start-from checkpoints/att",
        "checkpoints/att: has hidden_size 24, not 25; the two must be equal",
    ),
    (
        "--start-from another decoder",
        None,
        TRAIN + " --decoder lstm --start-from checkpoints/att",
        "checkpoints/att: holds the decoder attention, not lstm; give --decoder attention",
    ),
    (
        "--start-from no run",
        None,
        TRAIN + " --start-from checkpoints/none",
        "checkpoints/none: no such run; the runs are the folders in checkpoints/",
    ),
    (
        "a log that is none",
        put("checkpoints/att/log.jsonl", "{}\n"),
        RESUME,
        "checkpoints/att/log.jsonl: is not the log of a run, or damaged; move it away, or give another run",
    ),
    (
        "a server without http://",
        None,
        "dashboard --replay checkpoints/att --url localhost:8097",
        "localhost:8097: is no URL; give one such as http://127.0.0.1:8097",
    ),
    (
        "no visdom",
        None,
        f"dashboard --replay checkpoints/att {NOWHERE}",
        "--url http://127.0.0.1:9: does not answer (<urlopen error [Errno 111] Connection refused>); "
        "start it with: python -m captioning.dashboard",
    ),
    (
        "one run to compare",
        None,
        "dashboard --compare checkpoints/att",
        "--compare checkpoints/att: give two runs or more, or --replay for one",
    ),
    ("port 0", None, "dashboard --port 0", "--port 0: must be between 1 and 65535"),
    # flags
    (
        "an unknown flag",
        None,
        TRAIN + " --epoch 3",
        "unrecognized options: --epoch, 3; perhaps you meant --epochs or --warmup-epochs; see --help",
    ),
    (
        "a word for a number",
        None,
        TRAIN + " --hidden-size many",
        "--hidden-size: must be INT, not 'many'; see --help",
    ),
    (
        "a flag without its value",
        None,
        "train.py data/small --run",
        "--run: needs a value; see --help",
    ),
    (
        "no --run",
        None,
        "train.py data/small",
        "--run STR is required (name of the run, which is written to checkpoints/RUN); see --help",
    ),
    (
        "a run outside checkpoints",
        None,
        TRAIN.replace("--run new", "--run ../x"),
        "--run '../x': must be a plain name, such as att (kept in checkpoints/att)",
    ),
    (
        "a hidden run",
        None,
        TRAIN.replace("--run new", "--run .x"),
        "--run '.x': must be a plain name, such as att (kept in checkpoints/att)",
    ),
    ("no epochs", None, TRAIN.replace("--epochs 1", "--epochs 0"), "--epochs 0: must be 1 or more"),
    ("a learning rate that is no number", None, TRAIN + " --learning-rate nan", "--learning-rate nan: must be above 0"),
    ("a negative learning rate", None, TRAIN + " --learning-rate -1", "--learning-rate -1.0: must be above 0"),
    ("all dropped", None, TRAIN + " --dropout 1", "--dropout 1.0: must be at least 0 and below 1"),
    ("a clip that is no number", None, TRAIN + " --grad-clip nan", "--grad-clip nan: must be 0 or more"),
    (
        "too much smoothing",
        None,
        TRAIN + " --label-smoothing 2",
        "--label-smoothing 2.0: must be a fraction between 0 and 1",
    ),
    (
        "tied words of unequal sizes",
        None,
        TRAIN + " --tie-embeddings",
        "--tie-embeddings: --embedding-size 16 must equal --hidden-size 24",
    ),
    (
        "frozen words of nowhere",
        None,
        TRAIN + " --freeze-embeddings",
        "--freeze-embeddings requires --word-vectors FILE",
    ),
    (
        "CIDEr from nothing",
        None,
        TRAIN + " --objective cider",
        "--objective cider improves a trained run: give --start-from checkpoints/RUN",
    ),
    ("an LSTM's cell for attention", None, TRAIN + " --cell gru", "--cell requires --decoder lstm"),
    (
        "--resume with --overwrite",
        None,
        TRAIN + " --resume --overwrite",
        "--resume continues a run and --overwrite replaces it: give one of them",
    ),
    (
        "--flip without --fine-tune",
        None,
        TRAIN + " --flip",
        "--flip requires --fine-tune; cached features fix the encoder",
    ),
    (
        "--features-on with --fine-tune",
        None,
        TRAIN + " --fine-tune --features-on ram",
        "--features-on: not allowed with --fine-tune, which reads the photos themselves",
    ),
    (
        "a layer that is not there",
        None,
        TRAIN + f" --fine-tune {ENCODER} --weights random --unfreeze-from layer9",
        "--unfreeze-from layer9: resnet18.layer2 has only conv1, bn1, layer1 (.0 to .1), layer2 (.0 to .1); "
        "give one of them, or all",
    ),
    (
        "a dashboard without http://",
        None,
        TRAIN + " --dashboard localhost",
        "localhost: is no URL; give one such as http://127.0.0.1:8097",
    ),
    (
        "more memory than there is",
        None,
        TRAIN.replace("--hidden-size 24", "--hidden-size 24 --attention-size 100000000000"),
        "out of memory: lower --batch-size, now 6, and raise --grad-accumulation, now 1; or give --features-on ram or "
        "disk",
    ),
    ("a negative seed", None, TRAIN + " --seed -1", "--seed -1: must be between 0 and 2^63 - 1"),
    (
        "a seed beyond 64 bits",
        None,
        TRAIN + " --seed 99999999999999999999",
        "--seed 99999999999999999999: must be between 0 and 2^63 - 1",
    ),
    (
        "no word vectors",
        None,
        TRAIN + " --word-vectors none.vec",
        "none.vec: cannot be read (No such file or directory); give a text file of word vectors",
    ),
    (
        "word vectors of another size",
        None,
        TRAIN.replace("--embedding-size 16", "--embedding-size 17") + " --word-vectors vectors.vec",
        "vectors.vec: its vectors have 16 numbers, not 17; give --embedding-size 16",
    ),
    (
        "word vectors in binary",
        put("v.bin", bytes(range(256))),
        TRAIN + " --word-vectors v.bin",
        "v.bin: is not a text file of word vectors; give a .txt or .vec file of word2vec, GloVe or fastText; for "
        "word2vec's .bin, gensim writes one: KeyedVectors.load_word2vec_format(FILE, binary=True)."
        "save_word2vec_format('text.vec')",
    ),
    (
        "word vectors of another language",
        put("v.txt", "狗 " + " ".join(["1"] * 16) + "\n"),
        TRAIN + " --word-vectors v.txt",
        "v.txt: has none of the vocabulary's words; check that it is of the same language",
    ),
    (
        "photos and --data",
        None,
        GENERATE + " a.jpg --data data/small",
        "give a run, and photos or folders to caption, or --data data/NAME; or --score FILE",
    ),
    ("a beam of none", None, PHOTO + " --beam-size 0", "--beam-size 0: must be 1 or more"),
    (
        "groups that do not divide the beam",
        None,
        PHOTO + " --beam-groups 3",
        "--beam-groups 3: must divide --beam-size, now 5, and --num-captions, now 1",
    ),
    (
        "more captions than the beam",
        None,
        PHOTO + " --num-captions 9",
        "--num-captions 9: must be at most --beam-size, now 5",
    ),
    (
        "--top-p without --temperature",
        None,
        PHOTO + " --top-p 0.5",
        "--top-p: applies to sampling only; give --temperature too, or leave it out",
    ),
    (
        "--no-repeat-ngram with --temperature",
        None,
        PHOTO + " --temperature 1 --no-repeat-ngram 2",
        "--no-repeat-ngram: applies to beam search only; leave out this or --temperature",
    ),
    (
        "a minimum above the maximum",
        None,
        PHOTO + " --min-length 40",
        "--min-length 40: must be at most --max-length, now 30",
    ),
    (
        "a submission in English",
        None,
        GENERATE + " --data data/small --submission s.json",
        "--submission: AI Challenger is Chinese, but checkpoints/att writes English; give --json",
    ),
    (
        "scores without references",
        None,
        PHOTO + " --scores s.json",
        "--scores and --extremes require --data data/NAME, or --score FILE --references FILE",
    ),
    ("--features without --data", None, PHOTO + " --features data/small/features.h5", "--features requires --data"),
    ("--animate without --pictures", None, PHOTO + " --animate", "--animate requires --pictures"),
    (
        "--score without --references",
        None,
        "generate.py --score results.json",
        "--score needs one file of captions, or two to compare, and --references FILE or data/NAME",
    ),
    (
        "three files to score",
        None,
        "generate.py --score results.json results.json results.json --references data/small",
        "--score needs one file of captions, or two to compare, and --references FILE or data/NAME",
    ),
    ("a page of captions of anyone", None, SCORE + " --html x.html", "--score captions nothing: leave out --html"),
    (
        "results that are an object",
        put("r.json", {"a": 1}),
        SCORE_R,
        "r.json: has no list of captions; give COCO results or an AI Challenger submission",
    ),
    (
        "a result without a caption",
        put("r.json", [{"image_id": 1}]),
        SCORE_R,
        "r.json: entry 0 is not like {'image_id': 9, 'caption': 'a dog'}; fix it",
    ),
    (
        "a photo's caption twice",
        put("r.json", [{"image_id": "photo5", "caption": "a"}] * 2),
        SCORE_R,
        "r.json: image_id photo5 occurs twice; keep one caption per photo",
    ),
    (
        "--tokenizer for captions that are cut",
        None,
        SCORE + " --tokenizer jieba",
        "--tokenizer requires an annotation file; the captions of data/small are already tokenized",
    ),
    (
        "no references",
        None,
        "generate.py --score results.json --references none.json",
        "none.json: no such file; check the path",
    ),
    (
        "references of a split without photos",
        None,
        SCORE + " --split test",
        "data/small: has no test photos, only train, val; create them with: python -m preprocess data/small",
    ),
    (
        "a split that the annotations lack",
        None,
        "generate.py --score results.json --references karpathy.json --split test",
        "karpathy.json: holds no test images; give another --split or another file",
    ),
    (
        "a demo in French",
        None,
        "demo.py --language fr",
        "--language fr: must be one of en, zh; see --help",
    ),
    (
        "a list of scenes that is none",
        put("data/s/scenes.json", "{}x"),
        "preprocess data/s --scenes 20",
        "data/s/scenes.json: not a list of scenes (Extra data: line 1 column 3 (char 2)); remove it and draw them "
        "again",
    ),
]


@pytest.fixture
def here(artefacts, monkeypatch):
    artefacts.enter(monkeypatch)
    yield
    artefacts.restore()


@pytest.mark.parametrize("do, command, line", [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_mistake_gives_one_line_that_says_what_where_and_what_to_do(here, do, command, line, tally):
    if do:
        do()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        end = run_command(command)
    assert end.status in (1, 2), end.stdout
    assert re.fullmatch("error: " + re.escape(line).replace(re.escape("..."), ".*"), end.stderr)
    tally("bad inputs")


def test_the_table_has_no_row_twice_and_more_than_eighty():
    assert len({row[0] for row in TABLE}) == len(TABLE) > 80


# ---- environments that need a new process

ODD = {
    "LANG": "C",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONIOENCODING": "ascii",
    "OMP_NUM_THREADS": "abc",
    "CUDA_VISIBLE_DEVICES": "nonsense",
    "MPLCONFIGDIR": "/nowhere",
    "MPLBACKEND": "TkAgg",
    "TORCH_HOME": "/nowhere",
    "TMPDIR": "/nowhere",
    "RANK": "",
    "COLUMNS": "x",
}


def test_a_command_works_in_the_oddest_environment(here):
    """Without HOME, on an ASCII terminal and with nonsense in every variable of a library, a photo is captioned."""
    Path("照片.png").write_bytes(Path("data/small/photos/0.png").read_bytes())
    command = [
        sys.executable,
        ROOT / "generate.py",
        *GENERATE.split()[1:],
        "照片.png",
        "--html",
        "页.html",
        "--pictures",
        "画",
        "--max-length",
        "3",
        "--length-penalty",
        "9",
    ]
    done = subprocess.run(command, env=ODD, capture_output=True, text=True, encoding="ascii", timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert ".html: 1 captions" in done.stdout and Path("页.html").is_file() and any(Path("画").iterdir())


@pytest.mark.parametrize(
    "environment, line",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE are set, but not by torchrun (...); unset them"),
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK and WORLD_SIZE are set, but not by torchrun (...); unset them"),
    ],
)
def test_the_variables_of_another_launcher_give_one_line(here, monkeypatch, environment, line):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    end = run_command(TRAIN)
    error = r"error( \(process abc\))?: "
    assert end.status == 1 and re.fullmatch(error + re.escape(line).replace(re.escape("..."), ".*"), end.stderr), end


def test_a_font_without_the_letters_of_a_caption_gives_one_line(here, monkeypatch):
    monkeypatch.setattr("captioning.viewing.fonts._font_files", lambda: ())
    fonts._find_font.cache_clear()
    try:
        end = run_command(f"{PHOTO} --pictures drawn --max-length 3 --length-penalty 9")
        assert end.status == 1 and end.stderr.startswith(
            "error: no installed font has the letters ; install one that does"
        )
    finally:
        fonts._find_font.cache_clear()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full exists only on Linux")
def test_standard_output_on_a_full_disk_gives_one_line(here, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"{EXTRACT} --info".split())
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full, pytest.raises(SystemExit) as stop:
        monkeypatch.setattr(sys, "stdout", full)
        command_line.run(*COMMANDS["extract_features.py"])
    assert stop.value.code == (
        "error: the output: No space left on device; free some space or check the permissions, "
        "and give the same command again"
    )
