"""Write a run as a folder of web pages: the page, its scripts, onnxruntime-web, the words and the models.

    site/index.html, style.css, *.js, icon.svg      captioning/web/page/
    site/runtime/                                   onnxruntime-web, without a GPU and with one
    site/model/                                     encoder.onnx, begin.onnx, step.onnx, description.json; of a
                                                    calibrated run trust.bin

The files are static: any web server shows them. `python -m captioning.serve site/` does, on this machine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from captioning.captioner import DEFAULT_SEARCH, Captioner
from captioning.dataset.caption_dataset import photos_in_split
from captioning.encoders.grid import GRID_SIZE
from captioning.encoders.images import read_photos
from captioning.errors import UserError
from captioning.runtime.npm import Source, fetch
from captioning.web.onnx_decoder import OnnxModels
from captioning.web.precision import Choice, Models, choices
from captioning.web.trust import compare_probabilities, describe_good
from preprocess.captions import read_captions

PAGE = Path(__file__).with_name("page")
COMPARED_PHOTOS = 200
COMPARED_BATCH = 32
# What a browser loads: where it has no GPU, and where it has one
RUNTIME = {
    "cpu": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "gpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
ONNXRUNTIME_WEB = Source(
    "onnxruntime-web",
    "1.30.0",
    {f"dist/{name}": name for names in RUNTIME.values() for name in names},
    {
        "dist/ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
        "dist/ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
        "dist/ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
        "dist/ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
        "dist/ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
        "dist/ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
    },
)


def runtime_folder() -> Path:
    """Where onnxruntime-web is kept on this machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "kantu" / f"onnxruntime-web-{ONNXRUNTIME_WEB.version}"


def fetch_runtime() -> Path:
    """Download onnxruntime-web, unless it is there. Returns its folder. Raises UserError if it cannot be downloaded."""
    folder = runtime_folder()
    fetch([ONNXRUNTIME_WEB], folder, "the page (onnxruntime-web)")
    return folder


def smallest_models(captioner: Captioner, models: Models, data: Path | None, max_changed: float) -> Choice:
    """The smallest files of the models that change at most the fraction `max_changed` of the run's captions.

    data: the folder of a data set, whose validation photos are captioned; None: that of the run, if it is here. Without
    photos the models stay float32. Prints what was compared. Raises UserError if `data` cannot be read.
    """
    photos = _validation_photos(captioner, data)
    unchanged = Choice(dict.fromkeys(models, "float32"), dict(models), 0.0)
    if photos is None:
        return unchanged
    print(f"comparing captions of {len(photos)} photos with those of the run, smallest models first")
    grid = captioner.encoder(photos[:1])
    state = captioner.decoder.init_state(grid)
    sizes = len(state.per_photo), len(state.per_caption)
    results = [result for batch in photos.split(COMPARED_BATCH) for result in captioner.caption_resized(batch)]
    expected = [result.words for result in results]

    def search(candidate: Models) -> list[list[str]]:
        ids = OnnxModels(candidate, sizes, grid.pooling).caption(photos, DEFAULT_SEARCH)
        return [captioner.vocabulary.decode(words) for words in ids]

    for choice in choices(models, expected, search):
        print(choice, flush=True)
        if choice.changed <= max_changed:
            if results[0].probability is not None:
                models_of_page = OnnxModels(choice.models, sizes, grid.pooling)
                print(compare_probabilities(models_of_page, photos, captioner, results))
            return choice
    print(f"even float32 changes more than {max_changed:.1%}: onnxruntime rounds differently from torch")
    return unchanged


def _validation_photos(captioner: Captioner, data: Path | None) -> Tensor | None:
    """The first validation photos of a data set (B, 3, S, S) uint8; None, and a line, if those of the run are gone."""
    try:
        return _read_validation_photos(captioner, data or captioner.data)
    except UserError as error:
        if data:
            raise
        print(
            f"the models stay float32: no photos to compare captions of smaller ones on ({error}); give --data FOLDER"
        )
        return None


def _read_validation_photos(captioner: Captioner, folder: Path | None) -> Tensor:
    if folder is None:
        raise UserError("the run does not name its data")
    photos = photos_in_split(list(read_captions(folder)), "val", folder, COMPARED_PHOTOS)
    batch = read_photos([photo.image for photo in photos], range(len(photos)), captioner.encoder.transform)
    if not batch.indices:
        raise UserError(batch.failures[0])
    return batch.photos


def site_files(
    captioner: Captioner,
    run: Path,
    description: dict,
    choice: Choice,
    trust: tuple[dict[str, Any], bytes] | None,
    runtime: Path,
) -> dict[str, bytes]:
    """The content of every file of a site, by its path in it; that of description.json, which names the others, first.

    description: that of captioning/export.py, to which this adds what the page needs. trust: from `trust_of`.
    """
    files = {path.name: path.read_bytes() for path in sorted(PAGE.iterdir()) if path.is_file()}
    files |= {f"runtime/{name}": (runtime / name).read_bytes() for names in RUNTIME.values() for name in names}
    parts = {}
    for name, model in choice.models.items():
        path = f"model/{description['parts'][name]['file']}"
        files[path] = model
        parts[name] = {**description["parts"][name], "file": path, "precision": choice.precisions[name]}
    if trust:
        files[trust[0]["file"]] = trust[1]
    runtime_paths = {
        device: dict(zip(("script", "module", "binary"), (f"runtime/{name}" for name in names), strict=True))
        for device, names in RUNTIME.items()
    }
    words = {name: description.pop(name) for name in ("joined_by", "words")}  # last, as in other exports
    page = {
        **description,
        "parts": parts,
        "run": run_name(run),
        "beam_size": DEFAULT_SEARCH.beam_size,
        "num_captions": DEFAULT_SEARCH.beam_size,  # all beams, as alternatives
        "length_penalty": DEFAULT_SEARCH.length_penalty,
        "has_sentinel": captioner.decoder.has_sentinel,
        "grid": [GRID_SIZE, GRID_SIZE],
        "language": captioner.vocabulary.language,
        **({"trust": trust[0]} if trust else {}),
        "runtime": runtime_paths,
        "bytes": {path: len(content) for path, content in files.items()},
        **words,
    }
    return {"model/description.json": json.dumps(page, ensure_ascii=False, indent=1).encode(), **files}


def service_description(captioner: Captioner, run: Path) -> dict[str, Any]:
    """What the page needs to know of a model that runs on the server."""
    calibration = captioner.calibration
    return {
        "service": captioner.device.type,
        **({"trust": {"probability": {"good": describe_good(calibration)}}} if calibration else {}),
        "run": run_name(run),
        "decoder": captioner.decoder_name,
        "encoder": captioner.encoder.name,
        "joined_by": captioner.vocabulary.join(["", ""]),
        "has_sentinel": captioner.decoder.has_sentinel,
        "grid": [GRID_SIZE, GRID_SIZE],
    }


def run_name(run: Path) -> str:
    """The name of a run, of its folder or of a checkpoint file in it."""
    return run.name if run.suffix != ".pt" else run.parent.name
