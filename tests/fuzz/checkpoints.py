"""Coverage-guided fuzzing of the checkpoint reader: any bytes give a captioner or a UserError of one line.

    python -m tests.fuzz.checkpoints CORPUS -max_total_time=60        (pip install atheris; CORPUS: a folder)

An input is the pickle of a checkpoint, which is placed in a valid archive; or, after a first byte of 0, the complete
file.
"""

import importlib
import io
import sys
import zipfile

import atheris
import torch
from torch import _weights_only_unpickler

from captioning.captioner import Captioner
from captioning.decoders.factory import build_decoder
from captioning.errors import UserError
from captioning.runtime import checkpoint
from preprocess.vocabulary import SPECIAL, Vocabulary
from tests.fuzz import FOLDER, write_seeds

# Coverage of these functions guides the search: instrumenting all of torch would take minutes.
with atheris.instrument_imports(include=["torch._weights_only_unpickler"]):
    importlib.reload(_weights_only_unpickler)
for function in (checkpoint.load_checkpoint, Captioner.__init__, Vocabulary.__post_init__):
    atheris.instrument_func(function)

SIZES = {"vocabulary_size": 5, "channels": 2, "embedding_size": 2, "attention_size": 2, "hidden_size": 2, "dropout": 0}
STORAGE = bytes(64)  # the bytes of each tensor in the archive


def valid_checkpoint(name: str) -> bytes:
    """The smallest possible checkpoint of a run."""
    decoder = build_decoder(name, SIZES)
    saved = {
        "format": checkpoint.FORMAT,
        "config": {},
        "progress": {"epoch": 1},
        "vocabulary": Vocabulary("en", "whitespace", 1, (*SPECIAL, "dog")).to_dict(),
        "encoder": {"name": "resnet18", "weights": "imagenet", "sha256": "ab", "transform": {}, "state": None},
        "decoder": {"name": name, "sizes": SIZES, "state": decoder.state_dict()},
    }
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()


def pickle_of(checkpoint_file: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(checkpoint_file)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def archive_around(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)
        for number in range(20):
            archive.writestr(f"archive/data/{number}", STORAGE)
    return file.getvalue()


def read_bytes(data: bytes) -> None:
    """The fuzz target: fails on exceptions other than UserError."""
    path = FOLDER / "best.pt"
    path.write_bytes(data[1:] if data[:1] == b"\0" else archive_around(data))
    try:
        captioner = Captioner.load(path, "cpu", "float32")
        assert len(captioner.vocabulary) >= len(SPECIAL)
    except UserError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 1000, error


def seeds() -> list[bytes]:
    files = [valid_checkpoint(name) for name in ("lstm", "attention")]
    return [*map(pickle_of, files), *(b"\0" + file for file in files)]


if __name__ == "__main__":
    write_seeds(seeds())
    atheris.Setup(sys.argv, read_bytes)
    atheris.Fuzz()
