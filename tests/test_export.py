"""Exported runs: other programs generate the same captions as Kantu."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from captioning import export
from captioning.captioner import Captioner
from captioning.decoders.attention import AttentionDecoder
from captioning.decoders.factory import build_decoder
from captioning.decoders.protocol import State
from captioning.encoders.encoder import Encoder
from captioning.encoders.images import PILLOW, Transform
from captioning.encoders.loading import load_encoder
from captioning.errors import UserError
from captioning.runtime.checkpoint import save_checkpoint
from captioning.search.options import SearchOptions
from config import Export
from preprocess.vocabulary import END, START, VOCABULARY_FILE, Vocabulary

GREEDY = SearchOptions(beam_size=1, max_length=8)
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_RUNS = ["lstm", "gru", "attention", "hard-attention", "adaptive", "transformer", "updown", "xlan", "aoa"]
TORCH_RUNS = ["rnn", "attention", "hard-attention", "adaptive", "transformer", "updown", "xlan", "aoa"]
# Under --torture only: other cells of the lstm decoder, and a second format of a decoder. The suite exports each once:
# as ONNX, which takes three times as long, those whose layers differ most.
LONG_FORM = (
    *((run, "onnx") for run in ("gru", "hard-attention", "adaptive", "updown", "xlan", "aoa")),
    *((run, "torch") for run in ("rnn", "attention", "transformer")),
)
# Run -> decoder, its special sizes, and a seed with which the most likely word leads by at least 0.009 in
# log-probability, so that rounding does not change the captions.
RUNS = {
    "lstm": ("lstm", {}, 10),
    "gru": ("lstm", {"cell": "gru", "photo_norm": "none"}, 8),
    "rnn": ("lstm", {"cell": "rnn", "layers": 2}, 10),
    "attention": ("attention", {}, 13),
    "hard-attention": ("hard-attention", {"positions": "learnt"}, 14),
    "adaptive": ("adaptive", {}, 9),
    "transformer": ("transformer", {"encoder_layers": 1, "layers": 2, "heads": 4, "memory_slots": 3}, 9),
    "updown": ("updown", {}, 9),
    "xlan": ("xlan", {"heads": 2, "encoder_layers": 1}, 3),
    "aoa": ("aoa", {"heads": 2, "encoder_layers": 1}, 75),
}
EXAMPLE = Path(__file__).with_name("caption_with_onnxruntime.py")


def write_run(
    folder: Path, encoder: Encoder, vocabulary: Vocabulary, decoder: str, special: dict, seed: int, scale: float
) -> Path:
    """An untrained run whose weights are multiplied, most of them by `scale`, so that photos get different captions."""
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
    scales = {"output_layer": 20, "embedding": 1, "photo_projection": 3, "initial": 3, "value": 3, "whole": 3, "key": 3}
    if decoder in ("xlan", "aoa"):
        scales |= {"cell": 3, "layers": 1, "attention": 1, "query": 1, "keys_values": 1}
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights *= scales.get(name.partition(".")[0], scale)
    checkpoint = {
        "config": {},
        "vocabulary": vocabulary.to_dict(),
        "progress": {},
        "encoder": encoder.to_checkpoint(),
        "decoder": {"name": decoder, "sizes": sizes, "state": model.state_dict()},
    }
    save_checkpoint(folder / "best.pt", checkpoint)
    return folder


def write_tiny_run(folder: Path, small_data: Path, decoder: str, scale: float) -> Path:
    """The same with a tiny encoder of random weights, and the words of data/small."""
    vocabulary = Vocabulary.load(small_data / VOCABULARY_FILE)
    torch.manual_seed(0)  # of the encoder's weights
    encoder = Encoder("resnet18.layer1", "random", Transform(32))
    return write_run(folder, encoder, vocabulary, decoder, {}, seed=0, scale=scale)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Silence torch's log of every step of a trace: pytest captures logs of all levels, which is slow."""
    trace = logging.getLogger("torch.__trace")
    level = trace.level
    trace.setLevel(logging.CRITICAL)
    yield
    trace.setLevel(level)


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    """A folder with one run of every kind, all with one encoder."""
    folder = tmp_path_factory.mktemp("runs")
    vocabulary = Vocabulary.load(small_data / VOCABULARY_FILE)
    torch.manual_seed(0)
    encoder = Encoder("resnet18.layer2", "random", Transform(64))
    for run, (decoder, special, seed) in RUNS.items():
        write_run(folder / run, encoder, vocabulary, decoder, special, seed, scale=5)
    return folder


@pytest.fixture(scope="module")
def export_run(runs, times):
    """export_run(run, format): the folder of an export, created once per run and format.

    The encoder, which all runs share, is converted once per format.
    """
    folders, encoders = {}, {}
    export_module = export.export_module

    def export_encoder_once(name, module, file_format):
        if name != "encoder":
            return export_module(name, module, file_format)
        if file_format not in encoders:
            encoders[file_format] = export_module(name, module, file_format)
        return encoders[file_format]

    def export_run(run, format="onnx"):
        if (run, format) in LONG_FORM and times(True, False):
            pytest.skip("long form: make torture")
        need_packages()  # for both formats: TorchReader is derived from the ONNX reader
        if (run, format) not in folders:
            folders[run, format] = runs / run / format
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export, "export_module", export_encoder_once)
                export.main(Export(runs / run, out=folders[run, format], format=format))
        return folders[run, format]

    return export_run


def need_packages():
    for name in PACKAGES:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -c constraints.txt '.[export]'")
    if torch.__version__ < export.MIN_TORCH_FOR_ONNX:
        pytest.skip(f"torch {torch.__version__} is too old to write ONNX")


def load_program(folder, format="onnx"):
    """The stand-alone example, tests/caption_with_onnxruntime.py; for the torch format, with torch as the runtime."""
    need_packages()
    from tests.caption_with_onnxruntime import Captioner as OnnxReader

    class TorchReader(OnnxReader):
        def __init__(self, folder):
            self.description = json.loads((folder / "description.json").read_text("utf-8"))
            self.modules = {
                name: torch.export.load(folder / part["file"]).module()
                for name, part in self.description["parts"].items()
            }

        def run(self, name, **inputs):
            part = self.description["parts"][name]
            tensors = (torch.from_numpy(np.ascontiguousarray(inputs[key])) for key in part["inputs"])
            outputs = self.modules[name](*tensors)
            return {key: value.numpy() for key, value in zip(part["outputs"], outputs, strict=True)}

    return (OnnxReader if format == "onnx" else TorchReader)(folder)


def photo_paths(small_data):
    return sorted(map(str, (small_data / "photos").iterdir()))


def greedy_captions(run, photos):
    return [caption.text for caption in Captioner.load(run, "cpu", "float32").caption(photos, GREEDY)]


def assert_same_captions(run, photos, program):
    """The program generates Kantu's greedy captions.

    Where two words are equally likely up to rounding, and only there, up to a tenth of the captions may differ. Later
    words are not compared: the large weights amplify rounding errors.
    """
    program.description["max_length"] = GREEDY.max_length
    expected, actual = greedy_captions(run, photos), program.caption(photos)
    assert len(set(expected)) > 5
    different = [item for item in zip(photos, expected, actual, strict=True) if item[1] != item[2]]
    assert len(different) <= len(photos) / 10, different
    captioner = Captioner.load(run, "cpu", "float32")
    for item in different:
        assert gap_at_first_difference(captioner, *item) < 5e-3, item  # the program resizes with Pillow's rounding


def gap_at_first_difference(captioner, photo, one, other):
    """The difference of the log-probabilities of the first words in which two captions of a photo differ."""
    rows = [[START, *captioner.vocabulary.encode(text.split()), END] for text in (one, other)]
    common = next(i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b)
    transform = captioner.encoder.transform
    pixels = transform.resize(transform.open(photo))[None]  # (1, 3, S, S) uint8
    with torch.no_grad():
        state = captioner.decoder.init_state(captioner.encoder(pixels))
        for word in rows[0][:common]:
            log_probabilities, _, state, _ = captioner.decoder.step(torch.tensor([word]), state)
    return abs(log_probabilities[0, rows[0][common]] - log_probabilities[0, rows[1][common]]).item()


@pytest.mark.parametrize("run", ONNX_RUNS)
def test_onnxruntime_generates_the_same_greedy_captions(run, runs, export_run, small_data):
    photos = photo_paths(small_data)
    assert_same_captions(runs / run, photos, load_program(export_run(run)))


@pytest.mark.parametrize("run", TORCH_RUNS)
def test_torch_export_generates_the_same_greedy_captions(run, runs, export_run, small_data):
    photos = photo_paths(small_data)
    assert_same_captions(runs / run, photos, load_program(export_run(run, "torch"), "torch"))


@pytest.mark.parametrize("run, format", [*product(ONNX_RUNS, ["onnx"]), *product(TORCH_RUNS, ["torch"])])
def test_batches_of_any_size_and_several_captions_per_photo_work(run, format, runs, export_run, small_data):
    """With several captions per photo, as in beam search, the per-photo state is repeated for each caption."""
    program = load_program(export_run(run, format), format)
    decoder = Captioner.load(runs / run, "cpu", "float32").decoder
    paths, rng = photo_paths(small_data), np.random.default_rng(0)
    for photos, captions in ((1, 1), (1, 4), (3, 1), (3, 5)):
        cells = program.run("encoder", photos=np.stack([program.open(path) for path in paths[:photos]]))
        state = program.run("begin", **cells)
        per_photo = {name: value for name, value in state.items() if name.startswith("photo_")}
        growing = [name for name, shape in program.description["parts"]["step"]["inputs"].items() if "(B, T," in shape]
        words_read = photos * captions // 2
        rows = {
            name: rng.normal(
                size=(photos * captions, words_read, *shape[1:]) if name in growing else (photos * captions, *shape)
            )
            for name, shape in ((name, value.shape[1:]) for name, value in state.items() if name.startswith("row_"))
        }
        rows = {name: value.astype(np.float32) for name, value in rows.items()}
        words = rng.integers(0, len(program.description["words"]), photos * captions)
        repeated = {name: value.repeat(captions, 0) for name, value in per_photo.items()}
        actual = program.run("step", words=words, **repeated, **rows)
        per_caption = [value for name, value in rows.items() if name not in growing]
        parts = per_photo.values(), per_caption, [rows[name] for name in growing]
        with torch.no_grad():
            step = decoder.step(torch.from_numpy(words), State(*(tuple(map(torch.from_numpy, part)) for part in parts)))
        expected = {"log_probabilities": step.log_probabilities}
        if step.attention is not None:
            expected["attention"] = step.attention
        expected |= {f"next_row_{i}": value for i, value in enumerate(step.state.per_caption + step.state.growing)}
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value.numpy(), rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("run", ["lstm", "attention", "transformer"])
def test_the_description_lists_the_inputs_and_outputs_of_every_file(run, export_run):
    program = load_program(export_run(run))
    dtypes = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(uint8)": "uint8"}
    for name, session in program.sessions.items():
        part = program.description["parts"][name]
        for arguments, described in (
            (session.get_inputs(), part["inputs"]),
            (session.get_outputs(), part["outputs"]),
        ):
            actual = {item.name: f"{dtypes[item.type]} ({', '.join(map(str, item.shape))})" for item in arguments}
            assert actual == described


def test_the_example_runs_without_kantu_and_without_torch(export_run, small_data, runs, tmp_path):
    photos = photo_paths(small_data)[:3]
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert not {'torch', 'captioning', 'preprocess', 'config'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, str(EXAMPLE), str(export_run("attention")), *photos]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    texts = greedy_captions(runs / "attention", photos)
    for line, path, text in zip(result.stdout.splitlines(), photos, texts, strict=True):
        assert line.startswith(f"{path}: {text}")


def assert_same_cells(run, photos):
    """The program reads the same pixels, and gets the same cells from the exported encoder."""
    from onnxruntime import InferenceSession

    from tests.caption_with_onnxruntime import Captioner as Program

    captioner = Captioner.load(run, "cpu", "float32")
    modules = export.make_modules(captioner)
    program = SimpleNamespace(description=export.describe(captioner, modules, "onnx"))
    pixels = np.stack([Program.open(program, photo) for photo in photos])
    transform = captioner.encoder.transform
    expected = torch.stack([transform.resize(transform.open(photo)) for photo in photos])
    np.testing.assert_array_equal(pixels, expected)
    session = InferenceSession(export.export_module("encoder", modules["encoder"], "onnx"))
    (cells,) = session.run(None, {"photos": pixels})
    with torch.no_grad():
        np.testing.assert_allclose(cells, captioner.encoder(expected).cells, rtol=1e-3, atol=1e-3)


def test_real_photos_through_a_trained_encoder_get_the_same_captions(shared, small_data, tmp_path, times):
    """In the suite: the same cells, of an encoder truncated after a few layers, which keep their trained weights."""
    need_packages()
    name = times("mobilenet_v2.features.4", "mobilenet_v2")
    encoder = load_encoder(name, str(shared / "weights" / "mobilenet_v2_imagenet.pth"), 128)
    encoder.transform = replace(encoder.transform, decoding=PILLOW)  # as the program decodes: equal pixels
    vocabulary = Vocabulary.load(small_data / VOCABULARY_FILE)
    run = write_run(tmp_path / "real", encoder, vocabulary, "attention", {}, seed=0, scale=1)
    photos = sorted(map(str, (shared / "flickr8k" / "images").iterdir()))[:20]
    if times(True, False):
        return assert_same_cells(run, photos)
    export.main(Export(run))
    assert_same_captions(run, photos, load_program(run / "export"))


# ---- errors


def fake_export(name, module, file_format):
    return f"{name} {file_format}".encode()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture
def without_onnx(monkeypatch):
    """Skips the check for the ONNX packages, for tests with fake_export."""
    monkeypatch.setattr(export, "check_onnx", lambda file_format: None)


def test_an_existing_export_is_replaced_only_with_overwrite(runs, tmp_path, monkeypatch, without_onnx):
    monkeypatch.setattr(export, "export_module", fake_export)
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
    assert sorted(contents(out)) == ["begin.pt2", "description.json", "encoder.pt2", "step.pt2"], (
        "no file of the other format remains"
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_export_changes_no_file(runs, tmp_path, monkeypatch, without_onnx, overwrite):
    def fail_at_step(name, module, file_format):
        if name == "step":
            raise UserError("no")
        return fake_export(name, module, file_format)

    out = tmp_path / "out"
    if overwrite:
        monkeypatch.setattr(export, "export_module", fake_export)
        export.main(Export(runs / "lstm", out))
    before = contents(out)
    monkeypatch.setattr(export, "export_module", fail_at_step)
    with pytest.raises(UserError):
        export.main(Export(runs / "attention", out, overwrite=overwrite))
    assert contents(out) == before


def test_the_description_is_renamed_last(runs, tmp_path, monkeypatch, without_onnx):
    monkeypatch.setattr(export, "export_module", fake_export)
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda one, other: (renamed.append(Path(other).name), replace(one, other)))
    export.main(Export(runs / "lstm", tmp_path / "out"))
    assert len(renamed) == 4 and renamed[-1] == "description.json"


def test_the_default_folder_is_export_beside_the_checkpoint(runs, monkeypatch, without_onnx):
    monkeypatch.setattr(export, "export_module", fake_export)
    export.main(Export(runs / "rnn" / "best.pt", format="torch"))
    assert sorted(contents(runs / "rnn" / "export")) == ["begin.pt2", "description.json", "encoder.pt2", "step.pt2"]


def test_missing_packages_are_named_in_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    message = r"onnx and onnxscript not installed; run: pip install .*'\.\[export\]'"
    with pytest.raises(UserError, match=message) as error:
        export.main(Export(runs / "lstm"))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(export, "export_module", fake_export)
    export.main(Export(runs / "lstm", tmp_path, format="torch"))  # needs neither


@pytest.mark.parametrize("version, old", [("2.9.1", True), ("2.12.1+cu130", True), ("2.13.0", False), ("3.0", False)])
def test_a_torch_too_old_for_onnx_is_named_in_one_line(monkeypatch, version, old):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: "installed")
    if not old:
        return export.check_onnx()
    with pytest.raises(UserError, match=r"install torch 2\.13 or newer, or give --format torch"):
        export.check_onnx()


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_a_module_that_torch_cannot_export_is_reported_in_one_line(format, runs, monkeypatch):
    need_packages()
    original_step = AttentionDecoder.step

    def data_dependent_step(self, words, state):
        return original_step(self, words + 1 if words.sum() > 12 else words, state)

    modules = export.make_modules(Captioner.load(runs / "attention", "cpu", "float32"))
    monkeypatch.setattr(AttentionDecoder, "step", data_dependent_step)
    with pytest.raises(UserError, match=f"--format {format}: torch .* cannot export the step") as error:
        export.export_module("step", modules["step"], format)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
