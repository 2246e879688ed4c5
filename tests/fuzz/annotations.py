"""Coverage-guided fuzzing of the annotation reader: any bytes give records or a UserError of one line.

    python -m tests.fuzz.annotations CORPUS -max_total_time=60        (pip install atheris; CORPUS: a folder)

Half of the new inputs are mutations of the JSON tree, since randomly changed bytes are seldom valid JSON.
"""

import copy
import json
import os
import random
import sys
from pathlib import Path

import atheris

from tests.fuzz import FOLDER, write_seeds
from tests.torture.annotations import FORMS

with atheris.instrument_imports(include=["preprocess.annotations", "preprocess.content", "preprocess.readers"]):
    from preprocess import ANNOTATION_READERS, annotations

    list(ANNOTATION_READERS.values())  # imports the readers, so that they are instrumented

from captioning.errors import UserError
from preprocess.folders import SPLITS

TEXTS = [
    b'image,caption\na.jpg,"A dog, a cat"\nb.jpg,"x ""y"""\n',
    b"a.jpg#0\ta dog\na.jpg#1\tone dog\n",
    "图.jpg#zhc#0 一只狗\n".encode(),
    b"image_name| comment_number| comment\na.jpg| 0| A dog\na.jpg| 4   A cat\n",
    "filepath\ttitle\na.jpg\t一只狗\n".encode("utf-16"),
    "image,caption\na.jpg,一只狗\n".encode("gb18030"),
    b'{"file_name": "a.jpg", "text": "a dog"}\n{"file_name": "b.jpg", "text": ["a", null]}\n',
    b'{"a.jpg": ["a dog"], "b.jpg": null}',
]
SEEDS = [form(name, ("a dog", "")) for form in FORMS.values() for name in ("a.jpg", "图/b.png")]
VALUES = [
    None,
    True,
    -1,
    10**400,
    1.5,
    "",
    " ",
    "../a",
    "C:\\a",
    "\0",
    "\ud800",
    "restval",
    [],
    {},
    [[]],
    {"raw": "a"},
    {"tokens": ["a", 1]},
]
KEYS = [
    "image_id",
    "caption",
    "images",
    "annotations",
    "id",
    "file_name",
    "filename",
    "filepath",
    "cocoid",
    "split",
    "sentences",
    "raw",
    "tokens",
    "image",
    "text",
    "is_rejected",
]


def read_bytes(data: bytes) -> None:
    """The fuzz target: fails on exceptions other than UserError and on invalid records."""
    path = FOLDER / "annotations.json"
    path.write_bytes(data)
    for split in ("train", None):
        try:
            found = annotations.read_annotations(path, FOLDER, split)
            check(found.records, split)
            assert all(f"{item.where}{item.reason}".isprintable() for item in found.left_out)
        except UserError as error:
            check_line(error, path)
    try:
        annotations.read_references(path, "val")
    except UserError as error:
        check_line(error, path)


def check(records: list, split: str | None) -> None:
    assert records and len({record.id for record in records}) == len(records)
    for record in records:
        assert f"{os.path.normpath(record.image)}/".startswith(f"{FOLDER}/")
        assert record.split == split if split else record.split in ("", *SPLITS)
        assert any(map(str.strip, record.captions))
        assert all(type(text) is str for text in (record.image, record.id, *record.captions))
        assert (record.image + record.id).encode()  # can be encoded


def check_line(error: UserError, path: Path) -> None:
    assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1 and len(str(error)) < 1000, error
    assert str(error).isprintable(), ascii(str(error))


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Mutate an input: its bytes with libFuzzer, or one node of its JSON tree with `change`."""
    generator = random.Random(seed)
    if generator.random() < 0.5:
        return atheris.Mutate(data, most)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        tree = copy.deepcopy(generator.choice(SEEDS))
    holder = [tree]
    change(holder, generator)
    return json.dumps(holder[0]).encode()[:most]


def change(holder: list, generator: random.Random) -> None:
    """Walk to a random node and rename, repeat or replace it."""
    node, key = holder, 0
    while isinstance(node[key], (list, dict)) and node[key] and generator.random() < 0.8:
        node = node[key]
        key = generator.choice(list(node)) if isinstance(node, dict) else generator.randrange(len(node))
    if isinstance(node, dict) and generator.random() < 0.3:
        node[generator.choice(KEYS)] = node.pop(key)
    elif isinstance(node, list) and node is not holder and generator.random() < 0.3:
        node.insert(key, copy.deepcopy(node[key]))
    else:
        node[key] = copy.deepcopy(generator.choice(VALUES + SEEDS))


if __name__ == "__main__":
    write_seeds([*(json.dumps(seed).encode() for seed in SEEDS), *TEXTS])
    atheris.Setup(sys.argv, read_bytes, custom_mutator=mutate)
    atheris.Fuzz()
