"""No file that is read is ever executed, and none chooses which other files are read."""

import ast
import contextlib
import functools
import json
import marshal
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import extract_features
import generate
import train
from captioning.captioner import Captioner
from captioning.encoders.loading import load_encoder
from captioning.errors import UserError
from captioning.features.feature_reader import FeatureReader
from captioning.features.hdf5_layout import FORMAT as FEATURES_FORMAT
from captioning.runtime.checkpoint import FORMAT, load_checkpoint
from config import ExtractFeatures, Generate, Preprocess, Train
from preprocess import tokenizers
from preprocess.__main__ import main as preprocess
from preprocess.annotations import read_annotations
from tests.small import ENCODER, TINY
from tests.test_architecture import SOURCES
from tests.torture.annotations import FORMS

# ---- source code: nothing in it can execute what it reads

MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "imp", "code", "runpy"}
NAMES = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "system",
    "popen",
    "getoutput",
    "extractall",
    "unpack_archive",
    "load_state_dict_from_url",
}
METHODS = {"eval", "compile"}  # as methods of a torch module or of re these are harmless
LOADERS = ("jit.load", "hub.load", "package.PackageImporter", "np.load", "numpy.load")


def find_dangers(tree):
    """Yield the source of each statement that could execute data."""
    for node in ast.walk(tree):
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
        yield from (f"import {name}" for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            called, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            name, is_method = called.rpartition(".")[2], isinstance(node.func, ast.Attribute)
            safe = keywords.get("weights_only") == "True"
            if (
                (name in NAMES and not (is_method and name in METHODS))
                or called.endswith(LOADERS)
                or (called == "torch.load" and not safe)
                or not {"shell", "allow_pickle"}.isdisjoint(keywords)
            ):
                yield ast.unparse(node)


BETWEEN_OWN_PROCESSES = {
    "captioning.runtime.loader": ["import pickle"],  # what workers send to the process that started them; no file
}


@pytest.mark.parametrize("module", SOURCES)
def test_no_module_can_execute_what_it_reads(module):
    found = list(find_dangers(ast.parse(SOURCES[module].read_text("utf-8"))))
    assert found == BETWEEN_OWN_PROCESSES.get(module, [])


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "import pickle",
        "from pickle import loads",
        "import torch, yaml",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "torch.jit.load(path)",
        "subprocess.run(text, shell=True)",
        "np.load(path)",
        "archive.extractall(folder)",
        "torch.hub.load('a', 'b')",
    ],
)
def test_code_that_could_execute_data_is_recognised(code):
    assert len(list(find_dangers(ast.parse(code)))) == 1


# ---- crafted files are refused with one line and not executed


class Payload:
    """An object whose unpickling calls a function, here a harmless one that leaves a trace."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(trace):
    """Objects whose unpickling would create the folder `trace`, each in another way."""
    program = f"import os; os.mkdir({str(trace)!r})"
    return {
        "os.mkdir": Payload(os.mkdir, str(trace)),
        "eval": Payload(eval, f"__import__('os').mkdir({str(trace)!r})"),
        "exec": Payload(exec, program),
        "os.system": Payload(os.system, f"mkdir '{trace}'"),
        "partial": Payload(functools.partial(os.mkdir, str(trace))),
        "torch.load": Payload(torch.load, str(trace)),
        "open": Payload(open, str(trace), "w"),
    }


def zipped(data, path):
    torch.save(data, path)


def legacy(data, path):
    torch.save(data, path, _use_new_zipfile_serialization=False)


def plain(data, path):
    path.write_bytes(pickle.dumps(data))


CONTAINERS = {"zipped": zipped, "legacy": legacy, "plain pickle": plain}
READERS = {
    "a checkpoint": load_checkpoint,
    "a run to caption with": Captioner.load,
    "weights": lambda path: load_encoder("squeezenet1_1", str(path), 64),
    "a run's encoder": lambda path: load_encoder(None, str(path), None),
}


def refusal(work, *arguments):
    """Call `work`, which must raise a UserError of one line. Return its text."""
    with pytest.raises(UserError) as error:
        work(*arguments)
    text = str(error.value)
    assert "\n" not in text and "; " in text
    return text


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("reader", READERS)
def test_a_crafted_pickle_is_refused_and_not_executed(tmp_path, reader, container, tally):
    path, trace = tmp_path / ("squeezenet1_1.pth" if reader == "weights" else "best.pt"), tmp_path / "executed"
    for payload in payloads(trace).values():
        for data in (payload, {"format": FORMAT, "decoder": payload}, {"state_dict": payload}, [{"a": payload}]):
            CONTAINERS[container](data, path)
            assert str(path) in refusal(READERS[reader], path)
            assert not trace.exists()
            tally("crafted pickles")


def test_the_crafted_pickles_work_without_protection(tmp_path):
    """Otherwise the test above could not fail."""
    zipped({"format": payloads(tmp_path / "executed")["exec"]}, tmp_path / "best.pt")
    torch.load(tmp_path / "best.pt", weights_only=False)
    assert (tmp_path / "executed").is_dir()


def test_a_torchscript_program_is_refused_as_a_checkpoint(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "best.pt")
    refusal(load_checkpoint, tmp_path / "best.pt")
    refusal(READERS["weights"], tmp_path / "best.pt")


def test_the_commands_refuse_crafted_pickles(here, tmp_path, tally):
    evil, trace = tmp_path / "best.pt", tmp_path / "executed"
    zipped({"format": FORMAT, "config": payloads(trace)["os.mkdir"]}, evil)
    photo, data = Path("data/small/photos/0.png"), Path("data/small")
    beside = tmp_path / "features.h5"
    beside.write_bytes(Path("data/small/features.h5").read_bytes())
    beside.with_suffix(".encoder.pt").write_bytes(evil.read_bytes())
    for work, config in (
        (generate.main, Generate(evil, (photo,))),
        (generate.main, Generate(Path("checkpoints/lstm"), (photo,), ensemble=(evil,))),
        (train.main, Train(data, "never", start_from=evil, **TINY)),
        (train.main, Train(data, "never", features=(beside,), **TINY)),
        (train.main, Train(data, "never", fine_tune=True, encoder="resnet18.layer2", weights=str(evil), **TINY)),
        (extract_features.main, ExtractFeatures(data, weights=str(evil), out=tmp_path / "new.h5")),
        (extract_features.main, ExtractFeatures(data, **ENCODER, out=beside)),
        (extract_features.main, ExtractFeatures(data, out=beside, verify=True)),
    ):
        refusal(work, config)
        assert not trace.exists() and not (tmp_path / "new.h5").exists() and not Path("checkpoints/never").exists()
        tally("crafted pickles")


# ---- feature files that point elsewhere

SECRET = b"a line of a private file\n" * 200


def write_features(path, **odd):
    """Write a feature file of three photos. odd: name of an array -> the function that writes it instead."""
    usual = {
        "features": np.ones((3, 2, 2, 4), np.float16),
        "pooled": np.ones((3, 4), np.float32),
        "done": np.ones(3, np.uint8),
        "images": np.array(["a", "b", "c"], h5py.string_dtype()),
    }
    with h5py.File(path, "w") as file:
        file.attrs.update(
            format=FEATURES_FORMAT,
            encoder="e",
            weights="w",
            weights_sha256="s",
            precision="float32",
            native_grid=[2, 2],
        )
        for name, values in usual.items():
            if name in odd:
                odd[name](file, name, values)
            else:
                file[name] = values
    return path


def linked(file, name, values):
    file[name] = h5py.ExternalLink("other.h5", name)


def soft(file, name, values):
    file[f"the {name}"] = values
    file[name] = h5py.SoftLink(f"/the {name}")


def external(file, name, values):
    dtype = "S25" if values.dtype == object else values.dtype
    folder = Path(file.filename).parent
    size = int(np.prod(values.shape)) * np.dtype(dtype).itemsize
    file.create_dataset(name, values.shape, dtype, external=[(str(folder / "secret.txt"), 0, size)])


def virtual(file, name, values):
    layout = h5py.VirtualLayout(values.shape, values.dtype)
    layout[...] = h5py.VirtualSource(Path(file.filename).parent / "other.h5", name, values.shape)
    file.create_virtual_dataset(name, layout)


def group(file, name, values):
    file.create_group(name)


def chunks(file, name, values):
    file.create_dataset(name, data=values, chunks=values.shape)


def objects(file, name, values):
    file.create_dataset(name, values.shape, h5py.ref_dtype)


def numbers(file, name, values):
    file[name] = np.ones(values.shape, np.int64)


def more(file, name, values):
    file[name] = np.concatenate([values] * 3)


def endless(file, name, values):
    file.create_dataset(name, (10**11, *values.shape[1:]), values.dtype, chunks=(1000, *values.shape[1:]))


ODD = (linked, soft, external, virtual, group, chunks, objects, numbers, more, endless)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["features", "pooled", "done", "images"])
def test_a_feature_file_never_refers_to_another_file(tmp_path, name, odd, tally):
    (tmp_path / "secret.txt").write_bytes(SECRET)
    write_features(tmp_path / "other.h5")
    path = write_features(tmp_path / "features.h5", **{name: odd})
    if (name, odd) == ("images", chunks):  # harmless: the data are in the file
        assert [*FeatureReader(path).ids] == ["a", "b", "c"]
        return
    text = refusal(FeatureReader, path)
    assert text.startswith(str(path)) and "private" not in text and len(text) < 300
    tally("feature files that lead elsewhere, or nowhere")


def full_size(file, name):
    file[name] = np.ones((3, 14, 14, 4), np.float16)  # the default grid


@pytest.mark.parametrize("wrong", [None, "8x8", 2, [2], [2, 2, 2], [0, 2], [-1, -4], [10**9, 10**9], [2.5, 2]])
def test_a_feature_file_with_an_invalid_grid_gives_one_line(tmp_path, wrong):
    path = write_features(tmp_path / "features.h5", features=lambda file, name, values: full_size(file, name))
    with h5py.File(path, "r+") as file:
        del file.attrs["native_grid"]
        if wrong is not None:
            file.attrs["native_grid"] = wrong
    refusal(FeatureReader, path)


# ---- caches in the shared folder for temporary files


def test_jiebas_cache_is_neither_read_nor_written(tmp_path, monkeypatch):
    """By default jieba unmarshals jieba.cache from there, which any user could have written."""
    poison = marshal.dumps(({"毒": 1, "毒药": 99_999}, 100_000))
    (tmp_path / "jieba.cache").write_bytes(poison)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    jieba = tokenizers._load_jieba.__wrapped__()
    assert jieba.dt.FREQ.get("毒药") != 99_999
    assert jieba.lcut("两只小狗在草地上") == ["两只", "小狗", "在", "草地", "上"]
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"jieba.cache": poison}


def test_compiled_code_is_cached_in_the_home_folder_where_no_other_user_can_write(tmp_path, monkeypatch):
    torchs_own = os.path.join(tempfile.gettempdir(), "torchinductor_me")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", torchs_own)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    encoder = load_encoder("resnet18.layer1", "random", 32)
    monkeypatch.setattr(encoder.body, "compile", lambda **_: None)
    encoder.compile_for(1, torch.float32)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    encoder.compile_for(1, torch.float32)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")


# ---- ids never lead out of the image folder

UNSAFE = [
    "../a.jpg",
    "..",
    "a/../../b.jpg",
    "a/..",
    "/etc/passwd",
    "//server/share/a.jpg",
    "\\\\server\\share\\a.jpg",
    "C:\\x.jpg",
    "C:/x.jpg",
    "c:x.jpg",
    "a\\..\\b.jpg",
    "a\0.jpg",
    "\0",
    "\ud800.jpg",
]
part = st.sampled_from(["..", ".", "", "a", "b.jpg", "C:", "\\", "\\\\", "~", "\0", "图", " ", "...", "\n"])


def records_of(folder, data):
    with tempfile.TemporaryDirectory() as elsewhere:
        path = Path(elsewhere, "a.json")
        path.write_text(json.dumps(data), "utf-8")
        split = None if isinstance(data, dict) and "annotations" not in data else "train"
        return read_annotations(path, folder, split).records


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_an_id_that_leads_out_of_the_image_folder_is_refused(tmp_path, form, name, tally):
    assert "not a path in the image folder" in refusal(records_of, tmp_path, FORMS[form](name))
    tally("ids that leave the image folder")


@given(
    parts=st.lists(part, min_size=1, max_size=6),
    between=st.sampled_from(["/", "\\", "//", ""]),
    form=st.sampled_from(sorted(FORMS)),
)
def test_the_photo_of_any_accepted_id_lies_in_the_image_folder(parts, between, form):
    folder = Path(tempfile.gettempdir()).resolve()
    with contextlib.suppress(UserError):
        for record in records_of(folder, FORMS[form](between.join(parts))):
            assert f"{os.path.normpath(record.image)}/".startswith(f"{folder}/") and "\\" not in record.image


@pytest.fixture
def photos_at(tmp_path):
    """An image folder, and a photo outside it. Returns a function that preprocesses annotations of the given names."""
    for folder in ("images/sub", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("images/1.jpg", "images/sub/2.jpg", "elsewhere/private.jpg"):
        (tmp_path / name).write_bytes(b"a photo")

    def run(*names, images="images"):
        entries = [entry for name in names for entry in FORMS["AI Challenger"](name)]
        (tmp_path / "a.json").write_text(json.dumps(entries), "utf-8")
        preprocess(Preprocess(tmp_path / "data", (tmp_path / "a.json", tmp_path / images), min_count=1, workers=1))
        return {json.loads(line)["id"] for line in open(tmp_path / "data/captions.jsonl", encoding="utf-8")}

    return run


@pytest.mark.parametrize("target", ["../elsewhere/private.jpg", "{}/elsewhere/private.jpg"])
def test_links_that_the_user_laid_are_followed(tmp_path, photos_at, target):
    """Links are laid by whoever can write to the folder; an annotation file lays none, and names no path out of it."""
    (tmp_path / "images/link.jpg").symlink_to(target.format(tmp_path))
    (tmp_path / "images/folder").symlink_to(tmp_path / "elsewhere")
    names = {"1.jpg", "sub/2.jpg", "link.jpg", "folder/private.jpg"}
    assert photos_at(*names) == names


def test_links_within_the_image_folder_and_to_it_are_accepted(tmp_path, photos_at):
    (tmp_path / "images/link.jpg").symlink_to("sub/2.jpg")
    (tmp_path / "images/folder").symlink_to("sub")
    (tmp_path / "linked").symlink_to("images")
    names = {"1.jpg", "link.jpg", "folder/2.jpg"}
    assert photos_at(*names) == names
    shutil.rmtree(tmp_path / "data")
    assert photos_at(*names, images="linked") == names
