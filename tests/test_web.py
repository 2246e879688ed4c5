"""The captioner in a folder of web pages: it writes what Kantu writes, and sends photos nowhere."""

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bench import firefox
from bench import web as bench
from captioning import export, serve
from captioning.captioner import DEFAULT_SEARCH
from captioning.decoders import DECODERS
from captioning.encoders.encoder import Encoder
from captioning.encoders.grid import grid_pooling
from captioning.encoders.images import Transform, resize_with_pillow, resize_with_torch
from captioning.errors import UserError
from captioning.evaluation.candidates import FEATURES, find_candidates
from captioning.evaluation.consensus import NGramWeights
from captioning.evaluation.logistic import LogisticModel
from captioning.evaluation.ngrams import known_ngrams
from captioning.runtime import npm
from captioning.search.beam_search import beam_search
from captioning.search.options import SearchOptions
from captioning.web import precision, site
from captioning.web.onnx_decoder import OnnxModels
from captioning.web.precision import Choice, choices, quantize, store
from captioning.web.site import ONNXRUNTIME_WEB, PAGE, runtime_folder
from captioning.web.trust import compare_probabilities, mean_cells, trust_of
from config import Export, Serve
from preprocess.vocabulary import END, PAD, START, UNKNOWN, VOCABULARY_FILE, Vocabulary
from tests.test_beam_search import TableDecoder, make_grid
from tests.test_export import RUNS, write_run, write_tiny_run

# ---- the page's modules, in node


def run_in_node(code, *arguments):
    """Run JavaScript that imports modules of the page from PAGE -> what it prints."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: apt install nodejs")
    code = code.replace("PAGE/", PAGE.as_uri() + "/")
    command = [node, "--input-type=module", "--eval", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


RESIZE = """
import { Resizer } from "PAGE/image.js";
import { readFileSync, writeFileSync } from "node:fs";
const folder = process.argv[1];
for (const [i, { width, height, ...transform }] of JSON.parse(readFileSync(`${folder}/cases.json`)).entries()) {
  const rgba = readFileSync(`${folder}/${i}.rgba`);
  const resizer = new Resizer(width, height, transform);
  for (let top = 0; top < height; top += 7) resizer.addRows(rgba.subarray(4 * width * top, 4 * width * (top + 7)), top);
  writeFileSync(`${folder}/${i}.resized`, resizer.finish());
}
"""


def test_the_page_resizes_photos_as_training_does_bit_for_bit(tmp_path):
    random = np.random.default_rng(0)
    cases, photos = [], []
    for width, height in ((97, 61), (300, 10), (11, 9), (16, 16), (20, 130), (1, 300)):
        # new versions of Pillow begin with the columns of tall photos
        for decoding in ("pillow", "simplejpeg+torch") if width >= height else ("simplejpeg+torch",):
            for interpolation in ("bilinear", "bicubic"):
                photo = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
                photo[: height // 2] = 255 * (photo[: height // 2] > 127)  # hard edges: bicubic overshoots
                rgba = np.dstack([photo, np.full((height, width), 255, np.uint8)])
                rgba.tofile(tmp_path / f"{len(cases)}.rgba")
                photos.append(photo)
                cases.append(
                    {
                        "width": width,
                        "height": height,
                        "image_size": 16,
                        "interpolation": interpolation,
                        "decoding": decoding,
                    }
                )
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_in_node(RESIZE, tmp_path)
    for i, (photo, case) in enumerate(zip(photos, cases, strict=True)):
        resize = resize_with_pillow if case["decoding"] == "pillow" else resize_with_torch
        expected = resize(photo, 16, case["interpolation"]).numpy()
        actual = np.fromfile(tmp_path / f"{i}.resized", np.uint8).reshape(3, 16, 16)
        np.testing.assert_array_equal(actual, expected, err_msg=str(case))


TRUNCATION = """
import { isTruncated } from "PAGE/truncation.js";
import { readFileSync } from "node:fs";
const folder = process.argv[1];
const found = JSON.parse(readFileSync(`${folder}/ends.json`)).map(([name, ends]) => {
  const bytes = readFileSync(`${folder}/${name}`);
  return ends.map((end) => isTruncated(bytes.subarray(0, end)));
});
console.log(JSON.stringify(found));
"""


def test_photo_files_that_end_too_early_are_refused_in_every_browser(tmp_path):
    """Firefox would decode them. A thumbnail in a file is complete before the photo is."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    photo.save(tmp_path / "thumbnail", "jpeg")
    exif = b"Exif\0\0" + (tmp_path / "thumbnail").read_bytes()
    photo.save(tmp_path / "plain", "jpeg")
    photo.save(tmp_path / "progressive", "jpeg", progressive=True, exif=exif)
    photo.save(tmp_path / "chunks", "png")
    photo.save(tmp_path / "other", "webp")
    names = ("plain", "progressive", "chunks", "other")
    cases, expected = [], []
    for name in names:
        size = (tmp_path / name).stat().st_size
        with open(tmp_path / name, "ab") as file:
            file.write(b"what a phone appends")
        ends = [size + 20, size, size - 1, size // 2, size // 3, 12]
        cases.append((name, ends))
        expected.append([name != "other" and end < size for end in ends])
    (tmp_path / "ends.json").write_text(json.dumps(cases))
    assert json.loads(run_in_node(TRUNCATION, tmp_path)) == expected


SEARCH = """
import { beamSearch } from "PAGE/search.js";
import { readFileSync } from "node:fs";
const digits = (prefix) => Number(prefix.join(""));
const results = [];
for (const { options, rows } of JSON.parse(readFileSync(process.argv[1]))) {
  let prefixes = [[]];
  const step = async (parents, words) => {
    prefixes = parents.map((parent, i) => [...prefixes[parent], words[i]]);
    const found = prefixes.map((prefix) => rows[prefix.join()]);
    return {
      logProbabilities: Float32Array.from(found.flat(), (value) => value ?? -Infinity),
      attention: Float64Array.from(prefixes.flatMap((prefix) => [0, digits(prefix)])),
    };
  };
  results.push(await beamSearch({ step }, options));
}
console.log(JSON.stringify(results, (key, value) => (ArrayBuffer.isView(value) ? [...value] : value)));
"""


def test_the_pages_beam_search_finds_what_kantus_finds(tmp_path, times):
    """Also where captions are cut off, words are impossible, and fewer captions exist than are wanted."""
    cases, expected = [], []
    for seed in range(times(60, 600)):
        random = np.random.default_rng(seed)
        decoder = TableDecoder(seed, end=float(random.uniform(-4, 2)), impossible=float(random.choice([0, 0.5])))
        beam_size = int(random.integers(1, 7))
        search = SearchOptions(
            beam_size=beam_size,
            num_captions=int(random.integers(1, beam_size + 1)),
            max_length=int(random.integers(1, 6)),
            length_penalty=float(random.choice([0, 0.7, 1])),
        )
        (captions,) = beam_search(decoder, make_grid(0), search)
        expected.append(captions)
        rows = {
            ",".join(map(str, prefix)): [None if np.isinf(value) else value for value in row.tolist()]
            for (_, *prefix), row in decoder.rows.items()
        }
        options = {
            "start": START,
            "end": END,
            "never": [PAD, UNKNOWN, START],
            **{name: getattr(search, name) for name in ("beam_size", "num_captions", "max_length", "length_penalty")},
        }
        cases.append({"options": options, "rows": rows})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    actual = json.loads(run_in_node(SEARCH, tmp_path / "cases.json"))
    for captions, found, case in zip(expected, actual, cases, strict=True):
        assert [caption.words for caption in captions] == [caption["words"] for caption in found], case["options"]
        for caption, other in zip(captions, found, strict=True):
            assert caption.finished == other["finished"]
            assert caption.log_probability == pytest.approx(other["logProbability"], rel=1e-6)
            assert caption.attention.tolist() == other["attention"]


TRUST = """
import { Trust } from "PAGE/trust.js";
import { readFileSync } from "node:fs";
class Table {
  constructor(rows) {
    this.rows = rows;
  }
  restart() {
    this.prefixes = [[]];
  }
  async step(parents, words) {
    this.prefixes = parents.map((parent, i) => [...this.prefixes[parent], words[i]]);
    const unread = new Array(this.rows.size).fill(0); // after <end>
    return { logProbabilities: this.prefixes.flatMap((prefix) => this.rows[prefix.join()] ?? unread) };
  }
}
const folder = process.argv[1];
const content = new Uint8Array(readFileSync(`${folder}/trust.bin`)); // a copy, alone in its buffer
const { description, options, cases } = JSON.parse(readFileSync(`${folder}/cases.json`));
const results = [];
for (const { photo, meanPhoto, captions } of cases) {
  let features;
  const trust = await Trust.load(description, content, async (...found) => {
    features = found;
    return new Table(meanPhoto);
  });
  results.push(await trust.judge(new Table(photo), captions.map((words) => ({ words })), options));
  if (String(features) !== "2,2,2,2,2,2,1,2,3") throw new Error(String(features)); // and their shape
}
console.log(JSON.stringify(results));
"""


def make_calibration(cells, seed=0):
    """A calibration of nothing in particular, which knows n-grams of the words 4 to 8. cells: see `Calibration`."""
    random = np.random.default_rng(seed)
    captions = [random.integers(4, 9, random.integers(1, 7)) for _ in range(40)]
    lengths = np.array([len(caption) for caption in captions])
    known = known_ngrams(np.concatenate(captions), lengths, np.arange(20).repeat(2), 20, min_photos=2)
    size = len(FEATURES)
    model = LogisticModel(random.normal(size=size), random.uniform(1, 3, size), random.normal(size=size), -0.3)
    return SimpleNamespace(
        threshold=0.5, models={"log-probability": model}, mean_photo=cells, weights=NGramWeights(known)
    )


def stub_captioner(calibration, obstacle=None):
    return SimpleNamespace(calibration=calibration, probability_obstacle=lambda search: obstacle)


def test_the_page_judges_captions_as_kantu_does(tmp_path, times):
    """Evidence and probability, also of captions that are cut off, and of one alone."""
    calibration = make_calibration(torch.full((1, 1, 3), 2.0))
    description, content = trust_of(stub_captioner(calibration), 2)
    (tmp_path / "trust.bin").write_bytes(content)
    cases, expected = [], []
    for seed in range(times(15, 300)):
        decoder = TableDecoder(seed, end=seed % 3 - 1.0)
        search = SearchOptions(beam_size=1 + seed % 5, max_length=2 + seed % 4)
        (candidates,) = find_candidates(decoder, make_grid(0), search, decoder, make_grid(1), calibration.weights)
        expected.append(candidates)
        photo, mean_photo = (
            {"size": decoder.vocab_size}
            | {",".join(map(str, prefix)): row.tolist() for (of, *prefix), row in decoder.rows.items() if of == number}
            for number in (0, 1)
        )
        captions = [caption.words for caption in candidates.captions]
        cases.append({"photo": photo, "meanPhoto": mean_photo, "captions": captions})
    options = {"start": START, "end": END}
    (tmp_path / "cases.json").write_text(json.dumps({"description": description, "options": options, "cases": cases}))
    actual = json.loads(run_in_node(TRUST, tmp_path))
    probabilities = []
    for candidates, found in zip(expected, actual, strict=True):
        for evidence, caption in zip(candidates.evidence, found, strict=True):
            np.testing.assert_allclose(caption["evidence"], evidence[: len(caption["words"])], atol=1e-5)
        probabilities.append(found[0]["probability"])
        expected_probability = calibration.models["log-probability"].predict(candidates.features()[0])
        assert probabilities[-1] == pytest.approx(expected_probability, abs=1e-6)
        assert all("probability" not in caption for caption in found[1:])
    assert np.std(probabilities) > 0.1


@pytest.mark.parametrize("side", [12, 16])
def test_the_mean_photo_of_a_feature_file_of_14x14_cells_is_that_of_native_cells(side):
    """Those of 8 cells a side are read as native ones; those of 12 are not, nor those of more than 14."""
    pooling = grid_pooling(side, side)
    native = torch.rand(side**2, 3)
    pooled = pooling @ native
    (found,) = mean_cells(make_calibration(pooled.reshape(14, 14, 3)), side**2)
    torch.testing.assert_close(pooling @ found, pooled, rtol=1e-4, atol=1e-4)
    if side < 14:
        torch.testing.assert_close(found, native, rtol=1e-4, atol=1e-4)


def test_what_a_page_does_not_show_of_trust_is_said_at_the_export(capsys):
    assert trust_of(stub_captioner(None, "the run is not calibrated"), 4) is None
    assert capsys.readouterr().out.startswith("the page shows no probability and no evidence: the run is not calib")
    cells = torch.rand(2, 2, 3)
    captioner = stub_captioner(make_calibration(cells), "the run was calibrated with --samples 12")
    description, content = trust_of(captioner, 4)
    assert capsys.readouterr().out == "the page shows no probability: the run was calibrated with --samples 12\n"
    assert description == {"file": "model/trust.bin", "mean_photo": [4, 3]}
    assert np.frombuffer(content, "<f4").tolist() == cells.flatten().tolist()


TEXTS = """
globalThis.navigator ??= { language: "en" };
const { TEXT } = await import("PAGE/text.js");
console.log(JSON.stringify(TEXT));
"""


def test_the_page_says_the_same_in_english_and_in_chinese():
    english, chinese = json.loads(run_in_node(TEXTS)).values()
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", chinese[key])), key
        assert not re.search("[\u4e00-\u9fff]", text) or key == "language"
    used = "".join(path.read_text("utf-8") for path in PAGE.iterdir())
    assert [key for key in english if not re.search(rf"[\"\']{key}[\"\']|ready\.device", used)] == []


# ---- the files of a site


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    """An untrained run with a tiny encoder."""
    return write_tiny_run(tmp_path_factory.mktemp("runs") / "att", small_data, "attention", scale=1)


@pytest.fixture
def fake_export(monkeypatch, tmp_path):
    """Exports in no time: models of a few bytes, onnxruntime-web of a few others."""
    for names in site.RUNTIME.values():
        for name in names:
            (tmp_path / "runtime" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "runtime" / name).write_bytes(name.encode())
    monkeypatch.setattr(export, "check_onnx", lambda file_format: None)
    monkeypatch.setattr(export, "export_module", lambda name, module, file_format: name.encode())
    monkeypatch.setattr(export, "fetch_runtime", lambda: tmp_path / "runtime")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_site_is_complete_names_no_other_host_and_is_replaced_only_with_overwrite(run, fake_export, tmp_path, capsys):
    export.main(Export(run, tmp_path / "site", "web"))
    files = files_of(tmp_path / "site")
    description = json.loads(files["model/description.json"])
    parts = [part["file"] for part in description["parts"].values()]
    runtime = [path for paths in description["runtime"].values() for path in paths.values()]
    page = [path.name for path in PAGE.iterdir()]
    assert sorted(files) == sorted(["model/description.json", *parts, *runtime, *page])
    assert description["bytes"] == {path: len(content) for path, content in files.items() if "json" not in path}
    for name in page:
        text = (PAGE / name).read_text("utf-8")
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
        for path in re.findall(r'(?:from|src=|href=|startWorker\()\s*"([^"]+)"', text):
            assert path.removeprefix("./") in files
    assert "python -m captioning.serve" in capsys.readouterr().out

    with pytest.raises(UserError, match="index.html: already exists; give --overwrite, or another --out"):
        export.main(Export(run, tmp_path / "site", "web"))
    (tmp_path / "site/app.js").write_text("old")
    export.main(Export(run, tmp_path / "site", "web", overwrite=True))
    assert files_of(tmp_path / "site") == files


def test_without_the_scripts_and_without_a_network_one_line_says_what_to_do(run, monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(export, "check_onnx", lambda file_format: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="onnxruntime-web.*no network; npm is not installed.*start again") as error:
        export.main(Export(run, tmp_path / "site", "web"))
    assert "\n" not in str(error.value) and not (tmp_path / "site").exists()


def test_scripts_that_were_tampered_with_are_not_used(monkeypatch, tmp_path):
    def tampered(source):
        return dict.fromkeys(source.paths, b"evil")

    monkeypatch.setattr(npm, "_download_from_cdn", tampered)
    monkeypatch.setattr(npm, "_download_from_npm", tampered)
    with pytest.raises(UserError, match="ort.wasm.min.mjs is not the file that was tested"):
        npm.fetch([ONNXRUNTIME_WEB], tmp_path / "scripts", "the page")
    assert not (tmp_path / "scripts").exists()
    (tmp_path / "evil").write_text("evil")
    source = npm.Source("a", "1", {"good": "evil"}, {"good": "0" * 64})
    assert not npm.is_fetched(source, tmp_path), "a damaged file is downloaded again"


# ---- smaller models


def tiny_models(size=32):
    """encoder, begin and step of a decoder in which the photo and the words so far decide on the next one.

    Cells (B, 4, 3): the mean colours of the quarters of a photo of 8 x 8 pixels. The state has a part of each kind: the
    cells, a hidden state, and the words read. size: of the vocabulary.
    """
    pytest.importorskip("onnx", reason="onnx is not installed: pip install -c constraints.txt '.[export]'")
    from onnx import TensorProto, checker, helper, numpy_helper

    random = np.random.default_rng(3)

    def graph(name, nodes, inputs, outputs, **weights):
        types = {"photos": TensorProto.UINT8, "words": TensorProto.INT64}
        values = [
            [
                helper.make_tensor_value_info(key, types.get(key, TensorProto.FLOAT), ["B", *shape])
                for key, shape in part
            ]
            for part in (inputs, outputs)
        ]
        tensors = [numpy_helper.from_array(np.asarray(value), key) for key, value in weights.items()]
        program = helper.make_model(
            helper.make_graph([helper.make_node(*node[:3], **node[3]) for node in nodes], name, *values, tensors),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )
        checker.check_model(program)
        return program.SerializeToString()

    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    state = [("photo_0", [4, 3]), ("row_0", [64]), ("row_1", ["T", 64])]
    return {
        "encoder": graph(
            "encoder",
            [
                ("Cast", ["photos"], ["float"], {"to": TensorProto.FLOAT}),
                ("AveragePool", ["float"], ["quarters"], {"kernel_shape": [4, 4], "strides": [4, 4]}),
                ("Reshape", ["quarters", "shape"], ["channels"], {}),
                ("Transpose", ["channels"], ["large"], {"perm": [0, 2, 1]}),
                ("Div", ["large", "most"], ["cells"], {}),
            ],
            [("photos", [3, 8, 8])],
            [("cells", [4, 3])],
            shape=np.array([0, 3, 4]),
            most=np.float32(255),
        ),
        "begin": graph(
            "begin",
            [
                ("Identity", ["cells"], ["photo_0"], {}),
                ("Reshape", ["cells", "flat"], ["row"], {}),
                ("MatMul", ["row", "first"], ["row_0"], {}),
                ("Unsqueeze", ["row_0", "one"], ["words"], {}),
                ("Slice", ["words", "zero", "zero", "one"], ["row_1"], {}),
            ],
            [("cells", [4, 3])],
            state,
            zero=np.array([0]),
            one=np.array([1]),
            flat=np.array([0, 12]),
            first=2 * normal(12, 64),
        ),
        "step": graph(
            "step",
            [
                ("Gather", ["embedding", "words"], ["word"], {}),
                ("Unsqueeze", ["word", "one"], ["read"], {}),
                ("Concat", ["row_1", "read"], ["next_row_1"], {"axis": 1}),
                ("ReduceMean", ["next_row_1", "one"], ["mean"], {"keepdims": 0}),
                ("Sum", ["word", "row_0", "mean"], ["sum"], {}),
                ("Tanh", ["sum"], ["next_row_0"], {}),
                ("MatMul", ["next_row_0", "output"], ["logits"], {}),
                ("LogSoftmax", ["logits"], ["log_probabilities"], {"axis": 1}),
                ("ReduceSum", ["photo_0", "last"], ["light"], {"keepdims": 0}),
                ("Softmax", ["light"], ["attention"], {"axis": 1}),
            ],
            [("words", []), *state],
            [("log_probabilities", [size]), ("attention", [4]), ("next_row_0", [64]), ("next_row_1", ["T1", 64])],
            one=np.array([1]),
            embedding=normal(size, 64),
            output=normal(64, size),
            last=np.array([2]),
        ),
    }


def tiny_captions(models, photos, search=DEFAULT_SEARCH):
    """Word ids of the best captions of photos (B, 3, 8, 8), without a page."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: the extra named export")
    return OnnxModels(models, (1, 1), torch.ones(196, 4)).caption(photos, search)


@pytest.mark.parametrize("stored, error, fraction", [("float16", 1e-3, 0.6), ("int8", 2e-2, 0.4)])
def test_smaller_weights_compute_nearly_the_same(stored, error, fraction):
    models = tiny_models(size=256)
    small = {name: store(model, stored) for name, model in models.items()}
    assert len(small["step"]) < fraction * len(models["step"])
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: the extra named export")
    grid = SimpleNamespace(cells=torch.rand(2, 4, 3))
    one, other = (OnnxModels(candidate, (1, 1), torch.ones(196, 4)) for candidate in (models, small))
    words = torch.tensor([5, 6])
    expected = one.step(words, one.init_state(grid)).log_probabilities
    actual = other.step(words, other.init_state(grid)).log_probabilities
    difference = (actual - expected).abs().max() / expected.abs().max()
    assert 0 < difference < error


def test_codes_of_8_bits_are_half_a_scale_away_at_most():
    weights = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    weights[:, 3] *= 100  # one scale per row would lose the other columns
    codes, scales = quantize(weights)
    assert codes.dtype == np.int8 and scales.shape == (1, 30)
    assert (np.abs(codes * scales - weights) <= 0.501 * scales).all()
    assert (quantize(np.zeros((2, 3), np.float32))[0] == 0).all()


def test_the_smallest_models_that_keep_the_captions_are_chosen(monkeypatch, capsys):
    """The encoder here does not bear 8 bits, and half precision changes one caption of four."""
    models = {"encoder": b"e" * 100, "begin": b"b" * 200, "step": b"s" * 400}
    fraction = {"int8": 4, "float16": 2, "float32": 1}
    monkeypatch.setattr(precision, "store", lambda model, kind: model[: len(model) // fraction[kind]])
    tried = []

    def search(candidate):
        tried.append(sum(map(len, candidate.values())))
        damaged = {25: 4, 50: 1, 100: 0}[len(candidate["encoder"])]
        return [["other"]] * damaged + [["same"]] * (4 - damaged)

    found = list(choices(models, [["same"]] * 4, search))
    assert tried == sorted(tried) and len(found) == 9
    assert [(found[0].changed, found[1].changed, found[2].changed)] == [(1.0, 0.25, 0.0)]
    assert found[2].precisions == {"encoder": "float32", "begin": "int8", "step": "int8"}
    assert str(found[1]) == "encoder float16, decoder int8: 0.0 MB, 25.0% of the captions change"


def test_captions_of_validation_photos_decide_and_without_photos_models_stay_float32(
    run, small_data, monkeypatch, capsys
):
    captioner = export.Captioner.load(run, "cpu", "float32")
    captioner.data = small_data / "moved"
    models = {"encoder": b"", "begin": b"", "step": b""}
    choice = site.smallest_models(captioner, models, None, 0.01)
    unchanged = Choice(dict.fromkeys(models, "float32"), models, 0.0)
    assert choice == unchanged
    assert re.search("no photos to compare.*moved.*; give --data FOLDER\n", capsys.readouterr().out)
    with pytest.raises(UserError, match="moved"):
        site.smallest_models(captioner, models, small_data / "moved", 0.01)
    assert len(site._validation_photos(captioner, small_data)) == 4
    captioner.data = small_data
    assert len(site._validation_photos(captioner, None)) == 4
    compared = [Choice(dict.fromkeys(models, kind), {}, share) for kind, share in (("int8", 0.5), ("float16", 0.25))]
    monkeypatch.setattr(site, "choices", lambda *_: iter(compared))
    found = [site.smallest_models(captioner, models, None, max_changed) for max_changed in (0.5, 0.25, 0.2)]
    assert found == [*compared, unchanged], "the first that changes no more than allowed"


# ---- the server


def tiny_calibration():
    """Of `tiny_models`: the mean photo is a dark one."""
    return make_calibration(torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(1)) / 2)


def test_the_export_says_how_far_the_probabilities_of_a_page_are_from_the_runs():
    calibration = tiny_calibration()
    photos = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: the extra named export")
    models = OnnxModels(tiny_models(), (1, 1), torch.ones(196, 4))
    found = models.find_candidates(photos, DEFAULT_SEARCH, mean_cells(calibration, 4), calibration.weights)
    model = calibration.models["log-probability"]
    of_run = [float(model.predict(candidates.features()[0])) + 0.1 * i for i, candidates in enumerate(found)]
    expected = [SimpleNamespace(probability=probability) for probability in of_run]
    said = compare_probabilities(models, photos, stub_captioner(calibration), expected)
    assert said == "their probabilities differ by 0.050 (mean; largest 0.100)"


@pytest.fixture(scope="module")
def tiny_site(tmp_path_factory):
    """A site of `tiny_models`, without onnxruntime-web, and its description."""
    folder = tmp_path_factory.mktemp("tiny") / "site"
    models = tiny_models()
    captioner = SimpleNamespace(decoder=SimpleNamespace(has_sentinel=True), vocabulary=SimpleNamespace(language="en"))
    description = {
        "encoder": "mean",
        "decoder": "tiny",
        "interpolation": "bilinear",
        "decoding": "simplejpeg+torch",
        "image_size": 8,
        "start": START,
        "end": END,
        "never": [PAD, UNKNOWN, START],
        "max_length": 6,
        "parts": {name: {"file": f"{name}.onnx"} for name in models},
        "joined_by": " ",
        "words": [f"word{i}" for i in range(32)],
    }
    choice = Choice(dict.fromkeys(models, "float32"), models, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        if not npm.is_fetched(ONNXRUNTIME_WEB, runtime_folder()):
            patch.setattr(site, "RUNTIME", {})
        trust = trust_of(stub_captioner(tiny_calibration()), 4)
        files = site.site_files(captioner, folder, description, choice, trust, runtime_folder())
    page = json.loads(files["model/description.json"])
    files["model/description.json"] = json.dumps({**page, "grid": [2, 2]}).encode()
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def url(tiny_site):
    pytest.importorskip("tornado", reason="tornado is not installed: the extra named serve")
    with bench.served(tiny_site) as url:
        yield url


def test_the_server_sends_what_threads_need_and_nothing_outside_the_folder(url, tiny_site):
    types = {"": "text/html", "app.js": "text/javascript", "model/step.onnx": "application/octet-stream"}
    for path, kind in types.items():
        with urllib.request.urlopen(url + path) as response:
            assert response.headers["Content-Type"] == kind
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert response.read() == (tiny_site / (path or "index.html")).read_bytes()
    (tiny_site.parent / "secret").write_text("secret")
    for path, code in (("nothing", 404), ("../secret", 403), ("%2e%2e/secret", 403)):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(url + path)
        assert error.value.code in (code, 404)
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(url, data=b"a photo")


def test_what_cannot_be_served_is_one_line(run, tmp_path, tiny_site, url):
    with pytest.raises(UserError, match=r"index.html: no such file; give a run, such as .*, or write a site first"):
        serve.main(Serve(tmp_path))
    for option, flag in (({"queue": 5}, "--queue"), ({"search": SearchOptions()}, "--num-captions")):
        with pytest.raises(UserError, match=f"{flag}: applies to a run, but .*site is a site"):
            serve.main(Serve(tiny_site, **option))
    port = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port {port}: cannot listen on 127.0.0.1.*give another --port"):
        serve.main(Serve(tiny_site, port=port))
    with pytest.raises(UserError, match=f"--port {port}: cannot listen"):
        serve.main(Serve(run, port=port, device="cpu"))


# ---- a real browser


@pytest.fixture
def driver():
    problem = bench.missing()
    if not npm.is_fetched(ONNXRUNTIME_WEB, runtime_folder()):
        problem = "onnxruntime-web is not downloaded: run python -m captioning.export RUN --format web once"
    if problem:
        pytest.skip(problem)
    with bench.browser() as driver:
        yield driver


@pytest.fixture
def photo_paths(tmp_path):
    """Three photos, and two files that are none."""
    random = np.random.default_rng(0)
    quarters = random.integers(0, 256, (3, 3, 2, 2), dtype=np.uint8)
    photos = torch.from_numpy(quarters).repeat_interleave(4, 2).repeat_interleave(4, 3)  # (3, 3, 8, 8)
    paths = []
    for i, photo in enumerate(photos):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(paths[-1])
    (tmp_path / "3.png").write_bytes(paths[0].read_bytes()[:60])
    (tmp_path / "4.txt").write_text("not a photo")
    return [*paths, tmp_path / "3.png", tmp_path / "4.txt"]


def check_captions(page, paths, tiny_site):
    """The page's captions of photos, their evidence and their probability are Kantu's; what is no photo is refused."""
    photos = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths[:3]])).permute(0, 3, 1, 2)
    models = {name: (tiny_site / f"model/{name}.onnx").read_bytes() for name in ("encoder", "begin", "step")}
    search = SearchOptions(max_length=6)
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: the extra named export")
    calibration = tiny_calibration()
    candidates = OnnxModels(models, (1, 1), torch.ones(196, 4)).find_candidates(
        photos, search, mean_cells(calibration, 4), calibration.weights
    )
    expected = [" ".join(f"word{i}" for i in found.captions[0].words) for found in candidates]
    assert len(set(expected)) == 3
    page.add(paths)
    captions = [page.captions(number) for number in range(5)]
    assert [found[0] for found in captions[:3]] == expected and len(captions[0]) == 5
    assert captions[3] == ["3.png is not a photo that this browser can read. Try a JPEG, PNG or WebP file."]
    assert "4.txt is not a photo" in captions[4][0]
    for number, found in enumerate(candidates):
        page.show(number)
        evidence, probability = page.judgement()
        np.testing.assert_allclose(evidence, found.evidence[0][:-1], atol=1e-3)
        model = calibration.models["log-probability"]
        assert probability == pytest.approx(model.predict(found.features()[0]), abs=1e-3)


def test_the_page_captions_photos_shows_attention_and_sends_nothing(driver, url, tiny_site, photo_paths):
    page = bench.Page(driver, url)
    check_captions(page, photo_paths, tiny_site)
    page.show(0)
    page.point_at(1)
    veil = driver.execute_script("return [...veil.getContext('2d').getImageData(0, 0, 2, 2).data]")[3::4]
    assert min(veil) == 0 < max(veil) <= 217, "clear where attention was"
    said = r"“word\d+”: 100 % from the photo, 0 % from language alone\nevidence [+−]\d.\d: [\d.]+ times as .*"
    assert re.fullmatch(said, page.text("hint"))
    assert re.fullmatch(r"Probability that this is a good caption: \d+ %", page.text("trust"))
    driver.execute_script("arguments[0].click()", driver.find_element("id", "language"))
    page.wait(lambda: page.count("#caption.complete"))
    habit = "颜色浅的词出于语言习惯，而不是来自照片。"
    assert page.text("hint") == f"指向一个词，看模型当时看的是哪里。\n{habit}\n描述达到最大长度，被截断。"
    assert driver.execute_script("return crossOriginIsolated"), "threads"

    requests = page.requests()
    assert {method for method, _ in requests} == {"GET"}
    assert all(address.startswith((url, "blob:", "data:")) for _, address in requests)
    blocked = driver.execute_async_script(
        "const done = arguments[0]; document.onsecuritypolicyviolation = event => done(event.violatedDirective); "
        "fetch('http://127.0.0.1:1/', {method: 'POST'}).catch(() => setTimeout(done, 1000, 'not by the policy'))"
    )
    assert blocked == "connect-src"
    assert not [message for message in page.log() if "adapters" not in message and "Security Policy" not in message]

    driver.get((tiny_site / "index.html").as_uri())
    assert "python -m captioning.serve" in driver.find_element("id", "static").text


def test_firefox_shows_the_same_captions_and_sends_nothing(url, tiny_site, photo_paths, times):
    if times(True, False):
        pytest.skip("long form: make torture")
    if firefox.binary() is None or not npm.is_fetched(ONNXRUNTIME_WEB, runtime_folder()):
        pytest.skip("firefox is not installed, or onnxruntime-web is not downloaded: apt install firefox-esr")
    with firefox.firefox() as driver:
        page = bench.FirefoxPage(driver, url)
        check_captions(page, photo_paths, tiny_site)
        page.show(0)
        page.point_at(1)
        assert page.text("hint").startswith("“word")
        assert driver.execute_script("return crossOriginIsolated"), "threads"
        requests = page.requests()
        assert {method for method, _ in requests} == {"GET"}
        assert all(address.startswith((url, "blob:", "data:")) for _, address in requests)
        assert not page.log()


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_page_finds_the_beams_of_every_decoder(decoder, times, small_data, request, tmp_path, monkeypatch):
    """In all, it is given more than 100 photos; bench/web.py does the same with the run of a user.

    Two beams may be equally likely up to rounding, so a tenth of the photos may differ in one of five.
    """
    if times(True, False):
        pytest.skip("long form: make torture")
    driver = request.getfixturevalue("driver")
    torch.manual_seed(0)  # of the encoder's weights
    encoder = Encoder("resnet18.layer2", "random", Transform(64))
    special = next(sizes for name, sizes, _ in RUNS.values() if name == decoder)
    seed = RUNS["aoa"][2] if decoder == "aoa" else 0  # with 0 its captions are empty
    vocabulary = Vocabulary.load(small_data / VOCABULARY_FILE)
    run = write_run(tmp_path / "run", encoder, vocabulary, decoder, special, seed, scale=5)
    float32 = dict.fromkeys(("encoder", "begin", "step"), "float32")
    monkeypatch.setattr(export, "smallest_models", lambda captioner, models, *_: Choice(float32, models, 0.0))
    export.main(Export(run, tmp_path / "site", "web"))
    photos = sorted((small_data / "photos").iterdir())
    with bench.served(tmp_path / "site") as url:
        page = bench.Page(driver, url)
        page.add(photos)
        found = [page.captions(number) for number in range(len(photos))]
    results = export.Captioner.load(run, "cpu", "float32").caption(photos, SearchOptions(num_captions=5))
    expected = [[result.text, *(other.text for other in result.others)] for result in results]
    same = sum(one == other for one, other in zip(expected, found, strict=True))
    assert same >= 0.9 * len(photos) and len({text for beams in found for text in beams}) > len(photos)
