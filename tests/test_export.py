"""Exported runs: other programs write the very captions that Kantu writes."""

import json
import logging
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from captioning import export
from captioning.captioner import Captioner
from captioning.decoders.attention import AttentionDecoder
from captioning.decoders.factory import build_decoder
from captioning.decoders.protocol import State
from captioning.encoders.encoder import Encoder, load_encoder
from captioning.encoders.images import Transform
from captioning.errors import UserError
from captioning.runtime.checkpoint import save_checkpoint
from captioning.search.options import SearchOptions
from config import Export
from preprocess.vocabulary import END, START, VOCABULARY_FILE, Vocabulary

GREEDY, PACKAGES = SearchOptions(beam_size=1, max_length=8), ("onnx", "onnxscript", "onnxruntime")
IN_ONNX, IN_TORCH = ["lstm", "gru", "attention", "hard-attention", "adaptive"], ["rnn", "attention", "adaptive"]
# run -> decoder, what is special about it, and a seed with which no word is nearly as likely as the likeliest: by 0.009
# in log-probability, so that rounding changes no caption.
RUNS = {
    "lstm": ("lstm", {}, 10),
    "gru": ("lstm", {"cell": "gru", "photo_norm": "none"}, 8),
    "rnn": ("lstm", {"cell": "rnn", "layers": 2}, 10),
    "attention": ("attention", {}, 13),
    "hard-attention": ("hard-attention", {}, 14),
    "adaptive": ("adaptive", {}, 9),
}
EXAMPLE = Path(__file__).with_name("caption_with_onnxruntime.py")


def write_run(
    folder: Path, encoder: Encoder, vocabulary: Vocabulary, decoder: str, special: dict, seed: int, others: int
) -> Path:
    """A run that was never trained, but whose weights are so large that photos get different captions."""
    sizes = {
        "vocabulary_size": len(vocabulary),
        "channels": encoder.output_shape()[2],
        "embedding_size": 16,
        "attention_size": 16,
        "hidden_size": 24,
        "dropout": 0.5,
        **special,
    }
    torch.manual_seed(seed)
    model = build_decoder(decoder, sizes)
    larger = {"vocabulary": 20, "embedding": 1, "photo": 3, "initial": 3, "value": 3, "whole": 3, "key": 3}
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights *= larger.get(name.partition(".")[0], others)
    saved = {"name": decoder, "sizes": sizes, "state": model.state_dict()}
    save_checkpoint(
        folder / "best.pt",
        {
            "config": {},
            "vocabulary": vocabulary.to_dict(),
            "progress": {},
            "encoder": encoder.to_checkpoint(),
            "decoder": saved,
        },
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """pytest listens to everything: torch would tell it of every step of a trace."""
    trace = logging.getLogger("torch.__trace")
    level = trace.level
    trace.setLevel(logging.CRITICAL)
    yield
    trace.setLevel(level)


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    """A folder with a run of every kind, on one encoder."""
    folder, vocabulary = tmp_path_factory.mktemp("runs"), Vocabulary.load(small_data / VOCABULARY_FILE)
    torch.manual_seed(0)
    encoder = Encoder("resnet18.layer2", "random", Transform(64))
    for run, (decoder, special, seed) in RUNS.items():
        write_run(folder / run, encoder, vocabulary, decoder, special, seed, others=5)
    return folder


@pytest.fixture(scope="module")
def exported(runs):
    """exported(run, format): the folder of an export, made once; the encoder, which all share, is converted once."""
    made, encoders, plain = {}, {}, export.export_module

    def once(name, part, format):
        if name != "encoder":
            return plain(name, part, format)
        if format not in encoders:
            encoders[format] = plain(name, part, format)
        return encoders[format]

    def of(run, format="onnx"):
        need_packages()  # the reader of torch's is made of that of ONNX
        if (run, format) not in made:
            made[run, format] = runs / run / format
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export, "export_module", once)
                export.main(Export(runs / run, out=made[run, format], format=format))
        return made[run, format]

    return of


def need_packages():
    for name in PACKAGES:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -c constraints.txt '.[export]'")
    if torch.__version__ < export.MIN_TORCH_FOR_ONNX:
        pytest.skip(f"torch {torch.__version__} is too old to write ONNX")


def reader(folder, format="onnx"):
    """The stand-alone example; for torch, with torch in the place of onnxruntime."""
    need_packages()
    from tests.caption_with_onnxruntime import Captioner as Reader

    class TorchReader(Reader):
        def __init__(self, folder):
            self.about = json.loads((folder / "description.json").read_text("utf-8"))
            self.parts = {
                name: torch.export.load(folder / part["file"]).module() for name, part in self.about["parts"].items()
            }

        def run(self, name, **inputs):
            part = self.about["parts"][name]
            outputs = self.parts[name](*(torch.from_numpy(np.ascontiguousarray(inputs[key])) for key in part["inputs"]))
            return {key: value.numpy() for key, value in zip(part["outputs"], outputs, strict=True)}

    return (Reader if format == "onnx" else TorchReader)(folder)


def photos_in_split(small_data):
    return sorted(map(str, (small_data / "photos").iterdir()))


def greedy(run, photos):
    return [caption.text for caption in Captioner.load(run, "cpu", "float32").caption(photos, GREEDY)]


def assert_same_captions(run, photos, program):
    """As Kantu's greedy ones. Two words may be as likely as one another to rounding: there, and there alone, a caption
    may go another way. Later words would be chance: such large weights make more and more of what was rounded."""
    program.about["max_length"] = GREEDY.max_length
    expected, found = greedy(run, photos), program.caption(photos)
    assert len(set(expected)) > 5
    different = [pair for pair in zip(photos, expected, found, strict=True) if pair[1] != pair[2]]
    assert len(different) <= len(photos) / 10, different
    captioner = Captioner.load(run, "cpu", "float32")
    for pair in different:
        assert gap_where_they_part(captioner, *pair) < 1e-3, pair


def gap_where_they_part(captioner, photo, one, other):
    """Between the log-probabilities of the first words that differ."""
    rows = [[START, *captioner.vocabulary.encode(text.split()), END] for text in (one, other)]
    common = next(place for place, (a, b) in enumerate(zip(*rows, strict=False)) if a != b)
    transform = captioner.encoder.transform
    pixels = transform.resize(transform.open(photo))[None]  # (1, 3, S, S) uint8
    with torch.no_grad():
        state = captioner.decoder.init_state(captioner.encoder(pixels))
        for word in rows[0][:common]:
            said, _, state, _ = captioner.decoder.step(torch.tensor([word]), state)
    return abs(said[0, rows[0][common]] - said[0, rows[1][common]]).item()


@pytest.mark.parametrize("run", IN_ONNX)
def test_onnxruntime_alone_writes_kantus_greedy_captions(run, runs, exported, small_data):
    photos = photos_in_split(small_data)
    assert_same_captions(runs / run, photos, reader(exported(run)))


@pytest.mark.parametrize("run", IN_TORCH)
def test_what_torch_reads_again_writes_them_too(run, runs, exported, small_data):
    photos = photos_in_split(small_data)
    assert_same_captions(runs / run, photos, reader(exported(run, "torch"), "torch"))


@pytest.mark.parametrize("run, format", [*product(IN_ONNX, ["onnx"]), *product(IN_TORCH, ["torch"])])
def test_any_number_of_photos_goes_in_and_several_captions_of_each(run, format, runs, exported, small_data):
    """As beam search would have it: what is a photo's, repeated for each of its captions."""
    program, decoder = reader(exported(run, format), format), Captioner.load(runs / run, "cpu", "float32").decoder
    paths, random = photos_in_split(small_data), np.random.default_rng(0)
    for photos, captions in ((1, 1), (1, 4), (3, 1), (3, 5)):
        cells = program.run("encoder", photos=np.stack([program.open(path) for path in paths[:photos]]))
        state = program.run("begin", **cells)
        rows = {
            name: random.normal(size=(photos * captions, *value.shape[1:])).astype(np.float32)
            for name, value in state.items()
            if name.startswith("row_")
        }
        fixed = {name: value for name, value in state.items() if name.startswith("photo_")}
        words = random.integers(0, len(program.about["words"]), photos * captions)
        repeated = {name: value.repeat(captions, 0) for name, value in fixed.items()}
        found = program.run("step", words=words, **repeated, **rows)
        tensors = (tuple(map(torch.from_numpy, values.values())) for values in (fixed, rows))
        with torch.no_grad():
            said, attention, after, _ = decoder.step(torch.from_numpy(words), State(*tensors))
        expected = {
            "log_probabilities": said,
            "attention": attention,
            **{f"next_row_{i}": row for i, row in enumerate(after.per_caption)},
        }
        expected = {name: value for name, value in expected.items() if value is not None}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value.numpy(), rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("run", ["lstm", "adaptive"])
def test_the_description_says_what_goes_in_and_comes_out(run, exported):
    program = reader(exported(run))
    kinds = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}
    for name, session in program.sessions.items():
        part = program.about["parts"][name]
        for places, said in ((session.get_inputs(), part["inputs"]), (session.get_outputs(), part["outputs"])):
            assert {place.name: f"{kinds[place.type]} ({', '.join(map(str, place.shape))})" for place in places} == said


def test_the_example_runs_without_kantu_and_without_torch(exported, small_data, runs, tmp_path):
    photos = photos_in_split(small_data)[:3]
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert not {'torch', 'captioning', 'preprocess', 'config'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, str(EXAMPLE), str(exported("attention")), *photos]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert said.returncode == 0, said.stderr
    texts = greedy(runs / "attention", photos)
    for line, path, text in zip(said.stdout.splitlines(), photos, texts, strict=True):
        assert line.startswith(f"{path}: {text}")


def test_real_photos_through_a_real_encoder_get_the_same_captions(shared, small_data, tmp_path):
    need_packages()
    encoder = load_encoder("mobilenet_v2", str(shared / "weights" / "mobilenet_v2_imagenet.pth"), 128)
    vocabulary = Vocabulary.load(small_data / VOCABULARY_FILE)
    run = write_run(tmp_path / "real", encoder, vocabulary, "attention", {}, seed=0, others=1)
    photos = sorted(map(str, (shared / "flickr8k" / "images").iterdir()))[:20]
    export.main(Export(run))
    assert_same_captions(run, photos, reader(run / "export"))


# ---- what can go wrong


def stub(name, part, format):
    return f"{name} {format}".encode()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture
def no_need(monkeypatch):
    """Where nothing is converted, nothing need be installed."""
    monkeypatch.setattr(export, "check_onnx", lambda: None)


def test_an_export_that_is_there_is_kept_unless_it_may_be_replaced(runs, tmp_path, monkeypatch, no_need):
    monkeypatch.setattr(export, "export_module", stub)
    out = tmp_path / "out"
    export.main(Export(runs / "lstm", out))
    before = contents(out)
    assert sorted(before) == ["begin.onnx", "description.json", "encoder.onnx", "step.onnx"]
    with pytest.raises(UserError, match="already exists; give --overwrite") as error:
        export.main(Export(runs / "attention", out))
    assert "\n" not in str(error.value) and contents(out) == before
    export.main(Export(runs / "attention" / "best.pt", out, overwrite=True))
    assert contents(out).keys() == before.keys()
    assert json.loads((out / "description.json").read_bytes())["decoder"] == "attention"
    export.main(Export(runs / "attention", out, format="torch", overwrite=True))
    assert sorted(contents(out)) == ["begin.pt2", "description.json", "encoder.pt2", "step.pt2"], "nothing of the other"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_export_that_fails_leaves_everything_as_it_was(runs, tmp_path, monkeypatch, no_need, overwrite):
    def fails(name, part, format):
        if name == "step":
            raise UserError("no")
        return stub(name, part, format)

    out = tmp_path / "out"
    if overwrite:
        monkeypatch.setattr(export, "export_module", stub)
        export.main(Export(runs / "lstm", out))
    before = contents(out)
    monkeypatch.setattr(export, "export_module", fails)
    with pytest.raises(UserError):
        export.main(Export(runs / "attention", out, overwrite=overwrite))
    assert contents(out) == before


def test_the_description_comes_last(runs, tmp_path, monkeypatch, no_need):
    monkeypatch.setattr(export, "export_module", stub)
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda one, other: (renamed.append(Path(other).name), replace(one, other)))
    export.main(Export(runs / "lstm", tmp_path / "out"))
    assert len(renamed) == 4 and renamed[-1] == "description.json"


def test_beside_its_checkpoint_it_lies_unless_told_elsewhere(runs, monkeypatch, no_need):
    monkeypatch.setattr(export, "export_module", stub)
    export.main(Export(runs / "rnn" / "best.pt", format="torch"))
    assert sorted(contents(runs / "rnn" / "export")) == ["begin.pt2", "description.json", "encoder.pt2", "step.pt2"]


def test_missing_packages_are_named_in_a_line(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    said = r"onnx and onnxscript not installed; run: pip install .*'\.\[export\]'"
    with pytest.raises(UserError, match=said) as error:
        export.main(Export(runs / "lstm"))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(export, "export_module", stub)
    export.main(Export(runs / "lstm", tmp_path, format="torch"))  # which needs neither


@pytest.mark.parametrize("version, old", [("2.9.1", True), ("2.12.1+cu130", True), ("2.13.0", False), ("3.0", False)])
def test_a_torch_that_is_too_old_is_named_in_a_line(monkeypatch, version, old):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: "there")
    if not old:
        return export.check_onnx()
    with pytest.raises(UserError, match=r"install torch 2\.13 or newer, or give --format torch"):
        export.check_onnx()


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_what_torch_cannot_export_is_one_line(format, runs, monkeypatch):
    need_packages()
    plain = AttentionDecoder.step

    def undecided(self, words, state):
        return plain(self, words + 1 if words.sum() > 12 else words, state)

    parts = export.make_modules(Captioner.load(runs / "attention", "cpu", "float32"))
    monkeypatch.setattr(AttentionDecoder, "step", undecided)
    with pytest.raises(UserError, match=f"--format {format}: torch .* cannot export the step") as error:
        export.export_module("step", parts["step"], format)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
