"""Photos are copied to the device, and features back, unchanged and in order.

Without a GPU, torchvision's CPU decoder stands in for nvJPEG: it takes the same files and rejects them in the same way.
"""

import contextlib
import io
import re
import sys
import warnings
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import extract_features
from captioning.encoders import gpu_decoding
from captioning.encoders.encoder import Encoder
from captioning.encoders.gpu_decoding import (
    check_nvjpeg,
    copy_to_host,
    decode_files,
    decode_jpegs,
    find_decoder,
    load_photos,
    read_files,
)
from captioning.encoders.images import Transform, photo_batches, resize_with_torch
from captioning.errors import UserError
from captioning.features.feature_reader import FeatureReader
from config import ExtractFeatures
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from tests.small import ENCODER
from tests.test_images import a_photo

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NVJPEG = Transform(32, nvjpeg=True)


@pytest.fixture(autouse=True)
def forget_the_decoder():
    find_decoder.cache_clear()
    yield
    find_decoder.cache_clear()


def decoded_on_the_cpu(paths):
    return next(iter(photo_batches(paths, [list(range(len(paths)))], NVJPEG, 0)))


def decoded_by_nvjpeg(paths):
    return decode_files(read_files(paths, list(range(len(paths))), NVJPEG), paths, NVJPEG, CPU)


def assert_similar(one, other, levels=2):
    difference = one.float() - other.float()
    assert difference.abs().max() <= levels and difference.mean().abs() < 0.25


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_that_is_stored_rotated_is_left_to_the_cpu(tmp_path, orientation):
    """TorchCodec would turn it upright, torchvision would not."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    a_photo().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert read_files([tmp_path / "turned.jpg"], [0], NVJPEG).indices == [0] * (orientation == 1)
    assert_similar(
        decoded_by_nvjpeg([tmp_path / "turned.jpg"]).photos, decoded_on_the_cpu([tmp_path / "turned.jpg"]).photos
    )


@pytest.fixture
def all_kinds(tmp_path):
    """Paths of photos of every kind; two cannot be read. nvJPEG decodes only those named gpu."""
    photo, jpeg = a_photo(), io.BytesIO()
    photo.save(jpeg, "JPEG")
    files = {
        f"{i} {name}": tmp_path / f"{i} {name}"
        for i, name in enumerate(
            [
                "gpu.jpg",
                "png.png",
                "grey.jpg",
                "cmyk.jpg",
                "missing.jpg",
                "gpu progressive.jpg",
                "rgb.jpg",
                "truncated.jpg",
                "png called.jpg",
                "more after.jpg",
                "gpu last.jpg",
                "mpo.jpg",
            ]
        )
    }
    for name, path in files.items():
        if "png" in name:
            photo.save(path, "PNG")
        elif "truncated" in name:
            path.write_bytes(jpeg.getvalue()[:-1000])
        elif "mpo" in name:  # from a phone: several photos in one file
            photo.save(path, "MPO", save_all=True, append_images=[photo.rotate(90)])
        elif "after" in name:
            path.write_bytes(jpeg.getvalue() + b"appended by a phone")
        elif "missing" not in name:
            mode = {"grey": "L", "cmyk": "CMYK"}.get(name.split()[1][:4], "RGB")
            photo.convert(mode).save(path, quality=95, progressive="progressive" in name, keep_rgb="rgb" in name)
    return list(files.values())


def test_decoding_jpegs_emits_no_warning():
    file = io.BytesIO()
    a_photo().save(file, "JPEG")
    jpeg = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also those that Python hides by default, such as a DeprecationWarning
        (photo,) = decode_jpegs([jpeg], CPU)
    assert photo.shape == (3, 60, 90)


def test_the_cpu_decodes_files_that_nvjpeg_may_decode_differently(all_kinds):
    files = read_files(all_kinds, range(12), NVJPEG)
    assert [all_kinds[i].name for i in files.indices] == ["0 gpu.jpg", "5 gpu progressive.jpg", "10 gpu last.jpg"]
    assert files.sizes == [all_kinds[i].stat().st_size for i in files.indices]
    batch, expected = decoded_by_nvjpeg(all_kinds), decoded_on_the_cpu(all_kinds)
    assert batch.indices == expected.indices == [0, 1, 2, 3, 5, 6, 8, 9, 10, 11]
    assert batch.failures == expected.failures and "truncated" in batch.failures[1]
    for index, one, other in zip(batch.indices, batch.photos, expected.photos, strict=True):
        assert_similar(one, other, levels=2 if index in files.indices else 0)


def test_the_cpu_decodes_a_jpeg_that_nvjpeg_rejects_and_no_other(all_kinds, monkeypatch):
    decode_jpeg, rejected_size = torchvision.io.decode_jpeg, all_kinds[5].stat().st_size
    find_decoder(CPU)

    def strict(files, *settings):
        if any(len(file) == rejected_size for file in files):
            raise RuntimeError("Error while decoding JPEG images")
        return [255 - photo for photo in decode_jpeg(files, *settings)]  # negatives, to recognise them

    monkeypatch.setattr(torchvision.io, "decode_jpeg", strict)
    batch, expected = decoded_by_nvjpeg(all_kinds), decoded_on_the_cpu(all_kinds)
    photos = dict(zip(expected.indices, expected.photos, strict=True))
    assert_similar(batch.photos[4], photos[5], levels=0)
    for position, index in ((0, 0), (-2, 10)):
        assert_similar(batch.photos[position], 255 - photos[index])


def test_a_batch_may_hold_no_photo_for_nvjpeg_or_none_at_all(all_kinds, tmp_path):
    others = [all_kinds[1], all_kinds[2]]
    assert torch.equal(decoded_by_nvjpeg(others).photos, decoded_on_the_cpu(others).photos)
    empty = decoded_by_nvjpeg([tmp_path / "none.jpg"])
    assert empty.indices == [] and len(empty.photos) == 0 and "no such file" in empty.failures[0]


@pytest.mark.parametrize("fault", ["no GPU", "not compiled", "removed"])
def test_nvjpeg_that_is_not_available_is_refused_in_one_line(monkeypatch, fault):
    def not_compiled(*_):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    if fault == "not compiled":
        monkeypatch.setattr(torchvision.io, "decode_jpeg", not_compiled)
    elif fault == "removed":
        monkeypatch.delattr(torchvision.io, "decode_jpeg")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # not installed
    with pytest.raises(UserError) as error:
        check_nvjpeg(CPU if fault == "no GPU" else GPU)
    expected = {
        "no GPU": "--nvjpeg: decodes on a CUDA GPU, but this extraction runs on cpu; leave it out",
        "not compiled": r"--nvjpeg: torchvision .*not compiled with nvJPEG.* and torchcodec .* cannot decode JPEGs",
        "removed": r"--nvjpeg: torchvision .*no attribute.* and torchcodec .* cannot decode JPEGs on cuda; install",
    }
    assert re.match(expected[fault], str(error.value)) and "\n" not in str(error.value)


def test_torchcodec_decodes_where_torchvision_no_longer_does(all_kinds, monkeypatch):
    calls = []

    def decode_jpeg(files, *, mode, device):
        calls.append((len(files), mode, device))
        return [torch.from_numpy(simplejpeg.decode_jpeg(file.numpy(), mode)).permute(2, 0, 1) for file in files]

    expected = decoded_by_nvjpeg(all_kinds)
    find_decoder.cache_clear()
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    decoders = ModuleType("torchcodec.decoders")
    decoders.decode_jpeg = decode_jpeg
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    found = decoded_by_nvjpeg(all_kinds)
    assert calls == [(1, "RGB", CPU), (3, "RGB", CPU)]  # a trial, and the three of the batch
    assert found.indices == expected.indices and found.failures == expected.failures
    assert torch.equal(found.photos, expected.photos)


@pytest.mark.parametrize("interpolation, levels", [("bilinear", 1), ("bicubic", 10)])
def test_the_gpus_resize_is_that_of_the_cpu(interpolation, levels):
    """To one grey level. With bicubic weights the CPU also clamps between its passes along rows and columns."""
    photo = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (70, 90, 3))  # bicubic weights overshoot
    one = gpu_decoding.resize(torch.from_numpy(photo).permute(2, 0, 1), 32, interpolation)
    assert (one.int() - resize_with_torch(photo, 32, interpolation).int()).abs().max() <= levels


def test_nvjpeg_is_part_of_the_recipe(small_data, tmp_path, monkeypatch):
    setting = {**ENCODER, "out": tmp_path / "f.h5"}
    with pytest.raises(UserError, match="--nvjpeg: decodes on a CUDA GPU, but this extraction runs on cpu"):
        extract_features.main(ExtractFeatures(small_data, **setting, nvjpeg=True))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--scaled-decoding cannot be combined with --nvjpeg"):
        ExtractFeatures(small_data, nvjpeg=True, scaled_decoding=True)
    monkeypatch.setattr(extract_features, "check_nvjpeg", lambda *_: None)
    extract_features.main(ExtractFeatures(small_data, **setting, nvjpeg=True))
    assert FeatureReader(tmp_path / "f.h5").attributes["nvjpeg"]
    extract_features.main(ExtractFeatures(small_data, **setting))  # a setting that is not given is the file's
    assert FeatureReader(tmp_path / "f.h5").attributes["nvjpeg"]
    with pytest.raises(UserError, match="--scaled-decoding cannot be combined with --nvjpeg"):
        extract_features.main(ExtractFeatures(small_data, **setting, scaled_decoding=True))


def test_a_file_made_by_nvjpeg_is_not_completed_on_a_cpu_or_by_other_views(small_data, tmp_path, monkeypatch):
    setting = {**ENCODER, "out": tmp_path / "f.h5"}
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr(extract_features, "check_nvjpeg", lambda *_: None)
        extract_features.main(ExtractFeatures(small_data, **setting, nvjpeg=True))
    with pytest.raises(UserError, match="runs on cpu; the rows that are done were made with it: go on on a GPU"):
        extract_features.main(ExtractFeatures(small_data, **setting))
    with pytest.raises(UserError, match="f.h5: was extracted with --nvjpeg, which .*; extract it again with --overwri"):
        extract_features.main(ExtractFeatures(small_data, **setting, views=2))


@pytest.mark.parametrize("in_flight", [0, 1])
def test_results_are_returned_in_order_with_at_most_the_allowed_number_in_flight(monkeypatch, in_flight):
    monkeypatch.setattr(gpu_decoding, "MAX_IN_FLIGHT", {"cpu": in_flight})
    submitted = []

    def results():
        for number in range(4):
            submitted.append(number)
            yield [number], torch.full((2,), number), torch.tensor(float(number))

    num_submitted = []
    for i, (rows, vector, scalar) in enumerate(copy_to_host(results(), CPU)):
        assert rows == [i] and vector.tolist() == [i, i] and scalar == i
        num_submitted.append(len(submitted))
    assert num_submitted == ([1, 2, 3, 4] if in_flight == 0 else [2, 3, 4, 4])


class SimulatedGpu:
    """A device of type cuda on which everything happens at once, in the memory of the CPU."""

    type = "cuda"

    def install(self, monkeypatch):
        to, events = torch.Tensor.to, []
        stream = SimpleNamespace(
            synchronize=lambda: events.append("synchronize"), wait_stream=lambda other: events.append("wait")
        )
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda photos, stream: events.append("record"))
        monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: t if a[0] is self else to(t, *a, **k))
        monkeypatch.setattr(gpu_decoding, "find_decoder", lambda device: lambda files, _: find_decoder(CPU)(files, CPU))
        make_loader = gpu_decoding.make_loader
        monkeypatch.setattr(gpu_decoding, "make_loader", lambda *settings, pin: make_loader(*settings))
        return events


@pytest.mark.parametrize("nvjpeg", [False, True])
def test_photos_for_a_simulated_gpu_equal_those_that_the_cpu_decodes(all_kinds, monkeypatch, nvjpeg):
    gpu, plan = SimulatedGpu(), [[0, 1, 2], [3, 4, 5, 6], [7], [8, 9, 10, 11]]
    expected = list(photo_batches(all_kinds, plan, Transform(32), 0))
    events = gpu.install(monkeypatch)
    found = list(load_photos(gpu, all_kinds, plan, Transform(32, nvjpeg=nvjpeg), 1))
    assert events == ["synchronize", "wait", "record"] * 4
    for one, other in zip(found, expected, strict=True):
        assert (one.indices, one.failures, one.photos.shape) == (other.indices, other.failures, other.photos.shape)
        torch.testing.assert_close(one.photos, other.photos, rtol=0, atol=2 if nvjpeg else 0)


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("nvjpeg", [False, True])
def test_photos_on_the_gpu_equal_those_that_pillow_decodes(all_kinds, nvjpeg):
    if nvjpeg:
        check_nvjpeg(GPU)
    transform = Transform(32, nvjpeg=nvjpeg)
    plan = [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11]] * 5
    found, expected = load_photos(GPU, all_kinds, plan, transform, 2), photo_batches(all_kinds, plan, transform, 0)
    for one, other in zip(found, expected, strict=True):
        assert one.photos.is_cuda and (one.indices, one.failures) == (other.indices, other.failures)
        difference = (one.photos.cpu().int() - other.photos.int()).abs().float()
        assert difference.mean() < 4 if nvjpeg else difference.max() == 0


@needs_gpu
def test_nvjpeg_hardly_changes_the_features_of_real_photos(shared, capsys):
    paths = sorted(map(str, (shared / "coco_mini").rglob("*.jpg")))[:64]
    encoder = Encoder("mobilenet_v2", "random", Transform(256)).to(GPU)
    weights = torch.load(shared / "weights" / "mobilenet_v2_imagenet.pth", map_location="cpu", weights_only=True)
    encoder.body.load_state_dict({key: weights[key].float() for key in encoder.body.state_dict()})
    cells = []
    for nvjpeg in (False, True):
        with torch.inference_mode():
            [batch] = load_photos(GPU, paths, [list(range(64))], Transform(256, nvjpeg=nvjpeg), 0)
            cells.append(encoder(batch.photos).cells.flatten(1).float())
    similarity = F.cosine_similarity(*cells)
    with capsys.disabled():
        print(f"nvJPEG: mean cosine similarity of the features {similarity.mean():.4f}, minimum {similarity.min():.4f}")
    assert similarity.mean() > 0.99


@needs_gpu
def test_features_are_copied_to_pinned_memory_while_the_gpu_computes():
    def results():
        for number in range(6):
            yield [number], torch.full((1 << 20,), float(number), device=GPU)

    for rows, values in copy_to_host(results(), GPU):
        assert values.is_pinned() and (values == rows[0]).all()


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
def test_an_extraction_on_the_gpu_equals_one_on_the_cpu(tmp_path, compile):
    pixels = np.random.default_rng(0).integers(0, 255, (21, 64, 64, 3), np.uint8)
    for number, photo in enumerate(pixels):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    write_captions(
        tmp_path / CAPTIONS_FILE, [Photo(str(tmp_path / f"{i}.png"), str(i), "train", (("a",),)) for i in range(21)]
    )
    setting = {**ENCODER, "batch_size": 4}
    extract_features.main(ExtractFeatures(tmp_path, **setting, out=tmp_path / "cpu.h5"))
    setting |= {"device": "cuda", "compile": compile}
    extract_features.main(ExtractFeatures(tmp_path, **setting, out=tmp_path / "gpu.h5"))
    one, other = (FeatureReader(tmp_path / f"{name}.h5").read_stored(np.arange(21)) for name in ("cpu", "gpu"))
    np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=2e-2, atol=2e-2)
