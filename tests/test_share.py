"""Runs that are handed on: packed without pickles, described by a card, pushed to a hub and pulled from it."""

import json
import os
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import generate
from captioning import export, share
from captioning.captioner import Captioner
from captioning.decoders import DECODERS
from captioning.encoders.torchvision_backbone import TorchvisionFamily
from captioning.errors import UserError
from captioning.evaluation.metrics import METRICS
from captioning.runtime.checkpoint import load_checkpoint, save_checkpoint
from captioning.runtime.command_line import parse
from captioning.runtime.packed_run import PACKED_FILES, read_packed, write_packed
from captioning.runtime.settings import as_plain_data
from captioning.search.options import SearchOptions
from captioning.viewing import NOT_LEARNT
from captioning.viewing.model_card import encoder_licence, train_command
from config import Export, Generate, Share, Train
from tests.fake_hub import TOKEN, FakeHub

SEARCH = SearchOptions(length_penalty=9.0, max_length=6)  # without the penalty, so short a training returns no words
PHOTOS = [f"data/small/photos/{i}.png" for i in range(4)]
MODEL = "anna/small"


def pack(run, folder, **settings):
    share.main(Share("pack", str(run), str(folder), **settings))
    return folder


@pytest.fixture(scope="module")
def packed_once(small_runs, tmp_path_factory):
    return pack(small_runs / "checkpoints" / "attention", tmp_path_factory.mktemp("packed") / "packed")


@pytest.fixture
def packed(here, packed_once, tmp_path):
    """checkpoints/attention, packed: a copy that may be changed."""
    return shutil.copytree(packed_once, tmp_path / "packed")


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    return text


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_packed_run_captions_as_the_run_does_to_the_bit(here, tmp_path, decoder, times):
    if decoder not in ("lstm", "attention") and times(True, False):
        pytest.skip("long form: make torture")
    folder = pack(f"checkpoints/{decoder}", tmp_path / "packed")
    results = [
        Captioner.load(run, "cpu", "float32").caption(PHOTOS, SEARCH) for run in (f"checkpoints/{decoder}", folder)
    ]
    for one, other in zip(*results, strict=True):
        assert one.words and one.words == other.words and one.log_probability == other.log_probability
        assert (one.attention is None and other.attention is None) or torch.equal(one.attention, other.attention)


def test_nothing_in_a_packed_run_is_a_pickle(packed):
    assert {*PACKED_FILES, "README.md", "example.png"} == {path.name for path in packed.iterdir()}
    assert not any(zipfile.is_zipfile(path) for path in packed.iterdir())
    for name in ("config.json", "vocab.json"):
        json.loads((packed / name).read_text("utf-8"))


def test_generate_and_export_take_a_packed_run(packed, tmp_path, monkeypatch):
    settings = {"precision": "float32", "device": "cpu", "workers": 0, "search": SEARCH}
    for run, file in ((Path("checkpoints/attention"), "run.json"), (packed, "packed.json")):
        generate.main(Generate(run, (Path(PHOTOS[0]),), json=tmp_path / file, **settings))
    assert (tmp_path / "run.json").read_bytes() == (tmp_path / "packed.json").read_bytes()
    monkeypatch.setattr(export, "export_module", lambda name, module, file_format: b"")  # tests/test_export.py runs it
    export.main(Export(packed, tmp_path / "exported", "torch"))
    words = json.loads((tmp_path / "exported" / "description.json").read_text("utf-8"))["words"]
    assert words == load_checkpoint(packed)["vocabulary"]["words"]


def test_a_run_on_published_weights_is_packed_with_them(here, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(Path("checkpoints/attention"))
    state = checkpoint["encoder"]["state"]
    run = {**checkpoint, "encoder": {**checkpoint["encoder"], "weights": "imagenet", "state": None}}
    save_checkpoint(tmp_path / "run" / "best.pt", run)
    monkeypatch.setattr(TorchvisionFamily, "published_weights", lambda *arguments: state)
    folder = pack(tmp_path / "run", tmp_path / "packed")
    monkeypatch.setattr(TorchvisionFamily, "published_weights", None)  # they need not be downloaded again
    encoder = Captioner.load(folder, "cpu").encoder
    assert all(torch.equal(value, state[name]) for name, value in encoder.body.state_dict().items())
    assert "BSD-3-Clause" in (folder / "README.md").read_text("utf-8")


def test_tied_and_transposed_weights_come_back_as_they_were(tmp_path):
    weights = torch.randn(3, 4)
    state = {
        "tied": weights,
        "same": weights,
        "transposed": weights.T,
        "half": weights.half(),
        "count": torch.tensor(7),
    }
    parts = {"encoder": {"name": "e", "state": {}}, "decoder": {"name": "d", "sizes": {"a": 1}, "state": state}}
    write_packed(tmp_path, {"config": {"learning_rate": 0.1}, "vocabulary": {"words": ["狗"]}, "progress": {}, **parts})
    found = read_packed(tmp_path)
    assert found["vocabulary"] == {"words": ["狗"]} and found["config"] == {"learning_rate": 0.1}
    assert found["decoder"]["sizes"] == {"a": 1} and found["decoder"]["state"].keys() == state.keys()
    for name, value in state.items():
        assert found["decoder"]["state"][name].dtype == value.dtype
        assert torch.equal(found["decoder"]["state"][name], value)


def test_a_calibration_comes_back_as_it_was_and_its_file_is_needed(packed):
    checkpoint = load_checkpoint(packed)
    calibration = {"views": 1, "models": {"likely": [torch.arange(3), 0.5]}, "mean_photo": torch.randn(2, 2, 4)}
    write_packed(packed, {**checkpoint, "calibration": calibration})
    found = read_packed(packed)["calibration"]
    assert found["views"] == 1 and torch.equal(found["mean_photo"], calibration["mean_photo"])
    assert torch.equal(found["models"]["likely"][0], torch.arange(3)) and found["models"]["likely"][1] == 0.5
    (packed / "calibration.safetensors").unlink()
    with pytest.raises(UserError, match="calibration.safetensors"):
        read_packed(packed)
    write_packed(packed, {**checkpoint, "calibration": calibration})
    write_packed(packed, checkpoint)
    assert not (packed / "calibration.safetensors").exists() and "calibration" not in read_packed(packed)


@pytest.mark.parametrize("name", PACKED_FILES)
def test_a_missing_or_damaged_file_is_one_line_that_names_it(packed, name):
    path = packed / name
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged in (b"", content[:-10], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged") as error:
            load_checkpoint(packed)
        assert name in one_line(error)
    path.unlink()
    with pytest.raises(UserError, match=f"incomplete packed run, without {name}") as error:
        load_checkpoint(packed)
    one_line(error)


def test_content_of_another_structure_is_one_line(packed):
    checkpoint = read_packed(packed)
    config = checkpoint.pop("config")
    write_packed(packed, checkpoint)
    with pytest.raises(UserError, match="a checkpoint without config") as error:
        load_checkpoint(packed)
    one_line(error)
    write_packed(packed, {**checkpoint, "config": config, "progress": None, "vocabulary": ["words"]})
    with pytest.raises(UserError) as error:
        Captioner.load(packed)
    one_line(error)


def test_the_card_has_scores_with_intervals_and_the_licence_and_names_no_folder_of_this_machine(here, tmp_path):
    checkpoint = load_checkpoint(Path("checkpoints/attention"))
    private = {
        "data": "/srv/anna/data/secret",
        "features": ["/srv/anna/f.h5"],
        "dashboard": "http://anna.example:8097",
    }
    checkpoint["config"] |= private
    checkpoint["encoder"] |= {"weights": "/srv/anna/net.pth, fine-tuned in checkpoints/x"}
    run = tmp_path / "run"
    save_checkpoint(run / "best.pt", checkpoint)
    scores = {
        "run": "checkpoints/run",
        "data": "data/small",
        "split": "test",
        "photos": 7,
        "tokenizer": "whitespace",
        "search": as_plain_data(SEARCH),
        "word": dict.fromkeys(METRICS, 46.06),
        "intervals": {"word": dict.fromkeys(METRICS, [44.04, 48.26])},
    }
    (run / "scores.json").write_text(json.dumps(scores))
    folder = pack(run, tmp_path / "packed")
    card = (folder / "README.md").read_text("utf-8")
    assert card.count("46.1 (44.0 to 48.3)") == len(METRICS)
    assert "--split test --max-length 6 --length-penalty 9.0 --scores" in card
    assert "net.pth, fine-tuned in checkpoints/x" in card and "not known to Kantu" in card
    for name in ("README.md", "config.json"):
        assert "anna" not in (folder / name).read_text("utf-8")


def test_scores_of_another_or_an_older_run_are_not_in_the_card(here, tmp_path, capsys):
    run = tmp_path / "run"
    save_checkpoint(run / "best.pt", load_checkpoint(Path("checkpoints/lstm")))
    scores = run / "scores.json"
    scores.write_text(json.dumps({"run": "checkpoints/another", "intervals": {}}))
    with pytest.raises(UserError, match="of the run checkpoints/another, not of") as error:
        pack(run, tmp_path / "packed")
    one_line(error)
    os.utime(scores, (1, 1))
    card = (pack(run, tmp_path / "packed") / "README.md").read_text("utf-8")
    assert "older than the run, and left out" in capsys.readouterr().out
    assert "None were recorded" in card and "example.png" not in card


def test_without_scores_the_card_has_those_of_the_log_and_says_what_they_are(packed):
    card = (packed / "README.md").read_text("utf-8")
    assert re.search(r"On 4 \*\*validation\*\* photos, which also chose the epoch.*CIDEr-D [\d.]+", card)
    assert "none of others: it was trained from random weights" in card
    assert "20 photos to train on and 4 to validate" in card


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_command_of_a_card_trains_with_the_settings_of_the_run(here, decoder):
    settings = load_checkpoint(Path("checkpoints") / decoder)["config"]
    arguments = shlex.split(train_command(settings, "again"))
    assert arguments[:2] == ["python", "train.py"]
    again = as_plain_data(parse(Train, arguments[2:]))
    assert {name for name in again if again[name] != settings[name]} <= NOT_LEARNT
    watched = settings | {"dashboard": "http://here:8097", "tensorboard": True}
    assert train_command(watched, "again") == train_command(settings, "again"), "who watches it learns the same"


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("resnet18.layer2", "random, fine-tuned in checkpoints/a", "none of others"),
        ("resnet18", "imagenet, fine-tuned in checkpoints/a", "ImageNet"),
        ("resnet18", "resnet18.pth", "not known"),
    ],
)
def test_the_licence_of_an_encoder_is_given_where_it_is_known(name, weights, words):
    assert words in encoder_licence({"name": name, "weights": weights})


def test_the_example_picture_shows_a_photo_of_ones_own(here, tmp_path):
    folder = pack("checkpoints/lstm", tmp_path / "packed", photo=Path(PHOTOS[0]))
    assert (folder / "example.png").read_bytes()[:4] == b"\x89PNG"
    assert "![" in (folder / "README.md").read_text("utf-8")


def test_a_folder_of_other_files_is_never_replaced(packed, tmp_path):
    with pytest.raises(UserError, match="is not empty; give another folder, or --overwrite"):
        pack("checkpoints/lstm", packed)
    pack("checkpoints/lstm", packed, overwrite=True)
    assert load_checkpoint(packed)["decoder"]["name"] == "lstm"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        pack("checkpoints/lstm", tmp_path / "mine", overwrite=True)
    with pytest.raises(UserError, match="is a run"):
        pack("checkpoints/lstm", "checkpoints/attention", overwrite=True)
    with pytest.raises(UserError, match="is packed already"):
        pack(packed, tmp_path / "again")


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("safetensors.torch", lambda packed: load_checkpoint(packed)),
        ("safetensors.torch", lambda packed: pack("checkpoints/lstm", "new")),
        ("huggingface_hub", lambda packed: share.push(packed, MODEL, False)),
        ("huggingface_hub", lambda packed: share.pull(MODEL, packed / "new")),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_remedy(packed, monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=re.escape("pip install -c constraints.txt -e '.[hub]'")) as error:
        call(packed)
    assert package.partition(".")[0] in one_line(error)
    assert not Path("new").exists()


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, and a token that may write there."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its own protocol of large files
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    known = tmp_path / "hub.json"  # what the client would ask huggingface.co for, wherever the hub is
    known.write_text('{"harnesses": []}')
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(known), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_a_run_that_is_pushed_and_pulled_is_the_same(hub, packed, tmp_path):
    share.main(Share("push", str(packed), MODEL, private=True))
    assert hub.private == {MODEL} and set(hub.models[MODEL]) == {path.name for path in packed.iterdir()}
    (tmp_path / "new.part").mkdir()  # what a stopped pull leaves
    share.main(Share("pull", MODEL, str(tmp_path / "new")))
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == hub.models[MODEL]
    assert not [path for path in tmp_path.iterdir() if path.name not in ("new", "packed", "hub.json")]


def test_a_damaged_run_is_neither_pushed_nor_pulled(hub, packed, tmp_path):
    hub.models[MODEL] = {path.name: path.read_bytes() for path in packed.iterdir()}
    hub.models[MODEL]["config.json"] += b" "
    with pytest.raises(UserError, match=r"config.json: damaged"):
        share.pull(MODEL, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (packed / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"incomplete packed run, without vocab.json"):
        share.push(packed, MODEL, False)
    with pytest.raises(UserError, match="no packed run; make one with"):
        share.push(Path("checkpoints/lstm"), MODEL, False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("anna/nothing", "has no such model"),
        ("anna/other", "not a packed run of Kantu: lacks SHA256SUMS, config.json"),
        ("small", "not a name of a model"),
        ("anna/-bad-", "not a name of a model"),
    ],
)
def test_a_name_that_is_no_packed_run_is_one_line(hub, tmp_path, name, message):
    hub.models["anna/other"] = {"model.bin": b""}
    with pytest.raises(UserError, match=f"{name}: .*{message}") as error:
        share.pull(name, tmp_path / "new")
    one_line(error)
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize(
    ("token", "message"), [("", "there is no token to write with"), ("other", "refuses the token")]
)
def test_without_a_token_that_may_write_a_push_is_one_line(hub, packed, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message) as error:
        share.push(packed, MODEL, False)
    one_line(error)
    assert not hub.models


def test_a_hub_that_cannot_be_reached_is_one_line(hub, packed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for call in (lambda: share.push(packed, MODEL, False), lambda: share.pull(MODEL, tmp_path / "new")):
        with pytest.raises(UserError, match="127.0.0.1:1 cannot be reached.*set HF_ENDPOINT") as error:
            call()
        one_line(error)
