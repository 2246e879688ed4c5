"""Photos get to the device, and features back, unchanged and in order; with nvJPEG too, which here is played by
torchvision's decoder for CPUs: it takes the same files and refuses in the same way."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import extract_features
from captioning.encoders import gpu_decoding
from captioning.encoders.encoder import Encoder
from captioning.encoders.gpu_decoding import check_nvjpeg, copy_to_host, decode_files, load_photos, read_files
from captioning.encoders.images import Transform, photo_batches
from captioning.errors import UserError
from captioning.features.feature_reader import FeatureReader
from config import ExtractFeatures
from preprocess.captions import CAPTIONS_FILE, Photo, write_captions
from tests.small import ENCODER
from tests.test_images import a_photo

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NVJPEG = Transform(32, nvjpeg=True)


def ordinary(paths):
    return next(iter(photo_batches(paths, [list(range(len(paths)))], NVJPEG, 0)))


def on_the_gpu(paths):
    return decode_files(read_files(paths, list(range(len(paths))), NVJPEG), paths, NVJPEG, CPU)


def assert_alike(one, other, levels=2):
    difference = one.float() - other.float()
    assert difference.abs().max() <= levels and difference.mean().abs() < 0.25


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_decoded_on_the_gpu_stands_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    a_photo().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert read_files([tmp_path / "turned.jpg"], [0], NVJPEG).orientations == [orientation]
    assert_alike(on_the_gpu([tmp_path / "turned.jpg"]).photos, ordinary([tmp_path / "turned.jpg"]).photos)


@pytest.fixture
def all_kinds(tmp_path):
    """Photos of every kind by name; two of them nobody can read. Only those named gpu are for the GPU."""
    photo, whole = a_photo(), io.BytesIO()
    photo.save(whole, "JPEG")
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
                "cut.jpg",
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
        elif "cut" in name:
            path.write_bytes(whole.getvalue()[:-1000])
        elif "mpo" in name:  # a telephone's: several photos in one file
            photo.save(path, "MPO", save_all=True, append_images=[photo.rotate(90)])
        elif "after" in name:
            path.write_bytes(whole.getvalue() + b"what a phone adds")
        elif "missing" not in name:
            mode = {"grey": "L", "cmyk": "CMYK"}.get(name.split()[1][:4], "RGB")
            photo.convert(mode).save(path, quality=95, progressive="progressive" in name, keep_rgb="rgb" in name)
    return list(files.values())


def test_what_nvjpeg_might_read_otherwise_goes_the_ordinary_way(all_kinds):
    files = read_files(all_kinds, range(12), NVJPEG)
    assert [all_kinds[i].name for i in files.indices] == ["0 gpu.jpg", "5 gpu progressive.jpg", "10 gpu last.jpg"]
    assert files.sizes == [all_kinds[i].stat().st_size for i in files.indices]
    batch, expected = on_the_gpu(all_kinds), ordinary(all_kinds)
    assert batch.indices == expected.indices == [0, 1, 2, 3, 5, 6, 8, 9, 10, 11]
    assert batch.failures == expected.failures and "cut" in batch.failures[1]
    for index, one, other in zip(batch.indices, batch.photos, expected.photos, strict=True):
        assert_alike(one, other, levels=2 if index in files.indices else 0)
    assert len(read_files(all_kinds, range(12), Transform(32)).indices) == 0


def test_a_jpeg_that_nvjpeg_refuses_is_decoded_the_ordinary_way_and_no_other(all_kinds, monkeypatch):
    plain, refused = torchvision.io.decode_jpeg, all_kinds[5].stat().st_size

    def strict(files, *settings):
        if any(len(file) == refused for file in files):
            raise RuntimeError("Error while decoding JPEG images")
        return [255 - photo for photo in plain(files, *settings)]  # a negative: to be known by

    monkeypatch.setattr(torchvision.io, "decode_jpeg", strict)
    batch, expected = on_the_gpu(all_kinds), ordinary(all_kinds)
    photos = dict(zip(expected.indices, expected.photos, strict=True))
    assert_alike(batch.photos[4], photos[5], levels=0)
    for place, index in ((0, 0), (-2, 10)):
        assert_alike(batch.photos[place], 255 - photos[index])


def test_a_batch_without_one_photo_for_the_gpu_or_at_all(all_kinds, tmp_path):
    some = [all_kinds[1], all_kinds[2]]
    assert torch.equal(on_the_gpu(some).photos, ordinary(some).photos)
    nothing = on_the_gpu([tmp_path / "none.jpg"])
    assert nothing.indices == [] and len(nothing.photos) == 0 and "no such file" in nothing.failures[0]


@pytest.mark.parametrize("fault", ["no GPU", "not compiled", "dropped"])
def test_nvjpeg_is_refused_in_one_line_where_it_cannot_be(monkeypatch, fault):
    def not_compiled(*_):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    if fault == "not compiled":
        monkeypatch.setattr(torchvision.io, "decode_jpeg", not_compiled)
    elif fault == "dropped":
        monkeypatch.delattr(torchvision.io, "decode_jpeg")
    with pytest.raises(
        UserError, match="--nvjpeg: .* on cpu" if fault == "no GPU" else "--nvjpeg: torchvision"
    ) as error:
        check_nvjpeg(CPU if fault == "no GPU" else GPU)
    assert "\n" not in str(error.value)


def test_nvjpeg_is_part_of_the_recipe(small_data, tmp_path, monkeypatch):
    setting = {**ENCODER, "out": tmp_path / "f.h5"}
    with pytest.raises(UserError, match="--nvjpeg: decodes on a CUDA GPU, and this extraction runs on cpu"):
        extract_features.main(ExtractFeatures(small_data, **setting, nvjpeg=True))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--scaled-decoding cannot be combined with --nvjpeg"):
        ExtractFeatures(small_data, nvjpeg=True, scaled_decoding=True)
    monkeypatch.setattr(extract_features, "check_nvjpeg", lambda device: None)
    extract_features.main(ExtractFeatures(small_data, **setting, nvjpeg=True))
    assert FeatureReader(tmp_path / "f.h5").attributes["nvjpeg"]
    with pytest.raises(UserError, match="f.h5: was made with nvjpeg True, not False; give --overwrite"):
        extract_features.main(ExtractFeatures(small_data, **setting))


@pytest.mark.parametrize("behind", [0, 1])
def test_results_are_handed_over_in_order_and_as_far_behind_as_the_device_can_work(monkeypatch, behind):
    monkeypatch.setattr(gpu_decoding, "BEHIND", {"cpu": behind})
    begun = []

    def results():
        for number in range(4):
            begun.append(number)
            yield [number], torch.full((2,), number), torch.tensor(float(number))

    seen = []
    for rows, one, other in copy_to_host(results(), CPU):
        assert rows == [len(seen)] and one.tolist() == [len(seen)] * 2 and other == len(seen)
        seen.append(len(begun))
    assert seen == ([1, 2, 3, 4] if behind == 0 else [2, 3, 4, 4])


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("nvjpeg", [False, True])
def test_photos_on_the_gpu_are_those_of_the_ordinary_way(all_kinds, nvjpeg):
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
def test_nvjpeg_moves_the_features_of_real_photos_by_little(shared, capsys):
    paths = sorted(map(str, (shared / "coco_mini").rglob("*.jpg")))[:64]
    encoder = Encoder("mobilenet_v2", "random", Transform(256)).to(GPU)
    weights = torch.load(shared / "weights" / "mobilenet_v2_imagenet.pth", map_location="cpu", weights_only=True)
    encoder.body.load_state_dict({key: weights[key].float() for key in encoder.body.state_dict()})
    cells = []
    for nvjpeg in (False, True):
        with torch.inference_mode():
            [batch] = load_photos(GPU, paths, [list(range(64))], Transform(256, nvjpeg=nvjpeg), 0)
            cells.append(encoder(batch.photos).cells.flatten(1).float())
    alike = F.cosine_similarity(*cells)
    with capsys.disabled():
        print(f"nvJPEG: cosine similarity of the features {alike.mean():.4f}, at the least {alike.min():.4f}")
    assert alike.mean() > 0.99


@needs_gpu
def test_features_come_back_pinned_while_the_gpu_goes_on():
    def results():
        for number in range(6):
            yield [number], torch.full((1 << 20,), float(number), device=GPU)

    for rows, values in copy_to_host(results(), GPU):
        assert values.is_pinned() and (values == rows[0]).all()


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
def test_an_extraction_on_the_gpu_is_one_on_the_cpu(tmp_path, compile):
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
