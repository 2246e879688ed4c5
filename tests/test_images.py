"""Every stage turns photos of every kind into the same tensor."""

import io
import itertools
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from captioning.encoders import images
from captioning.encoders.images import (
    Augment,
    FailureLimit,
    Transform,
    decode_photo,
    open_image,
    open_photo,
    photo_batches,
    read_photos,
    resize_with_pillow,
    resize_with_torch,
    to_rgb,
)
from captioning.errors import PhotoError, UserError
from captioning.runtime.photo_formats import PhotoBytes, is_photo

OLD = Transform.from_dict({"image_size": 32})  # of files and runs of before, which name no decoding


def a_photo(width=90, height=60):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (6, 9, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_the_transform_is_torchvisions_resize_and_normalise():
    photo, transform = a_photo(), Transform(image_size=32)
    reference = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize((32, 32), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(transform.mean, transform.std),
        ]
    )(photo)
    normalised = transform.normalise(transform.resize(photo)[None])[0]
    assert (normalised - reference).abs().max() < 0.02  # one step of 8 bits, 1/255/0.225, where the rounding differs


# ---- decoding


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "LA", "1", "I;16", "YCbCr"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    if mode == "I;16":
        photo = Image.fromarray(np.asarray(a_photo().convert("L")).astype(np.uint16) * 257)
    else:
        photo = a_photo().convert(mode)
    extension = {"CMYK": "jpg", "YCbCr": "jpg", "I;16": "tif", "LA": "tif"}.get(mode, "png")
    path = tmp_path / f"photo.{extension}"
    photo.save(path)
    opened = open_photo(path)
    assert opened.mode == "RGB" and opened.size == (90, 60)
    if mode in ("L", "I;16"):
        np.testing.assert_allclose(np.asarray(opened)[..., 0], np.asarray(a_photo().convert("L")), atol=1)
    np.testing.assert_array_equal(decode_photo(path), opened)


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "progressive", "restarts"])
@pytest.mark.parametrize("size", [(90, 60), (301, 199), (8, 5)])
def test_a_plain_jpeg_has_the_same_pixels_as_from_pillow(tmp_path, monkeypatch, subsampling, size):
    photo, path = a_photo(*size), tmp_path / "photo.jpg"
    if subsampling == "progressive":
        photo.save(path, progressive=True)
    elif subsampling == "restarts":
        photo.save(path, restart_marker_blocks=1)
    else:
        path.write_bytes(simplejpeg.encode_jpeg(np.asarray(photo), 90, colorsubsampling=subsampling))
    expected = np.asarray(open_photo(path))
    monkeypatch.setattr(images, "to_rgb", lambda image: pytest.fail("decoded by Pillow"))
    np.testing.assert_array_equal(decode_photo(path), expected)


def outcome(decode, path):
    try:
        return np.asarray(decode(path)).tobytes()
    except PhotoError as error:
        return str(error)


def test_a_damaged_jpeg_is_read_or_refused_exactly_as_by_pillow(tmp_path, times):
    rng, path = np.random.default_rng(0), tmp_path / "photo.jpg"
    refused = total = 0
    for subsampling, progressive in itertools.product((0, 2), (False, True)):
        file = io.BytesIO()
        a_photo(30, 20).save(file, "JPEG", subsampling=subsampling, progressive=progressive)
        good = np.frombuffer(file.getvalue(), np.uint8)
        files = [good[:length] for length in range(0, len(good), times(17, 1))]
        for _ in range(times(50, 3000)):
            damaged = good.copy()
            damaged[rng.integers(2, len(good), 2)] = rng.integers(0, 256, 2)
            files.append(damaged)
        for content in [good, *files]:
            path.write_bytes(content.tobytes())
            expected = outcome(open_photo, path)
            assert outcome(decode_photo, path) == expected
            refused += isinstance(expected, str)
            total += 1
    assert 0.3 < refused / total < 0.9


def test_a_jpeg_that_is_larger_than_pillow_was_told_is_left_to_pillow(tmp_path, monkeypatch):
    a_photo().save(tmp_path / "photo.jpg")
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda *_, **__: (60_000, 60_000, "YCbCr", "420"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    assert decode_photo(tmp_path / "photo.jpg").size == (90, 60)


def test_a_rotated_photo_stands_upright(tmp_path):
    exif = Image.Exif()
    for orientation in range(9):  # 1 is upright, 0 is none
        exif[0x0112] = orientation
        a_photo(90, 60).save(tmp_path / "photo.jpg", exif=exif)
        with Image.open(tmp_path / "photo.jpg") as photo:
            expected = np.asarray(ImageOps.exif_transpose(photo))
        for decode in (open_photo, decode_photo):
            np.testing.assert_array_equal(decode(tmp_path / "photo.jpg"), expected)
    assert expected.shape == (90, 60, 3)


def test_transparent_pixels_become_white():
    assert to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_an_unreadable_photo_is_named_with_its_reason(tmp_path):
    good = io.BytesIO()
    a_photo(300, 200).save(good, "JPEG")
    files = {"missing.jpg": None, "empty.jpg": b"", "text.jpg": b"hello", "short.jpg": good.getvalue()[:-2000]}
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for decode in (open_photo, decode_photo):
            with pytest.raises(PhotoError, match=name):
                decode(tmp_path / name)
    with pytest.raises(PhotoError):
        decode_photo(tmp_path)


def test_an_absurdly_large_photo_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    for name, allowed, limit in (("a.png", 1000, "1,000"), ("b.png", 3000, "3,000"), ("c.jpg", 1000, "3,000")):
        a_photo().save(tmp_path / name)  # 5,400 pixels: of up to twice as many as it allows Pillow only warns
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", allowed)
        with pytest.raises(PhotoError, match=f"more than {limit} pixels"):
            decode_photo(tmp_path / name)


@pytest.mark.parametrize("limit, size", [(2000, (45, 30)), (3000, (45, 30))])
def test_a_jpeg_of_up_to_three_times_pillows_limit_is_decoded_small(tmp_path, monkeypatch, limit, size):
    """A phone's have 108 megapixels, Pillow allows 89. Pillow warns of more, and of twice as many it raises."""
    a_photo().save(tmp_path / "photo.jpg")
    content = (tmp_path / "photo.jpg").read_bytes()
    (tmp_path / "photo").write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for decode, photo in itertools.product((open_photo, decode_photo), (tmp_path / "photo", PhotoBytes(content, "x"))):
        decoded = decode(photo)
        assert np.shape(decoded) == (size[1], size[0], 3)
        expected = np.asarray(a_photo().resize(size, Image.Resampling.BOX), int)
        assert abs(np.asarray(decoded, int) - expected).mean() < 8


def test_threads_that_read_photos_at_once_leave_the_warning_filters_as_they_were(tmp_path):
    a_photo().save(tmp_path / "photo.jpg")
    before = [*warnings.filters]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        photos = {thread: open_image(tmp_path / "photo.jpg") for thread in (one, other)}
        for thread, photo in photos.items():
            thread.submit(photo.__enter__).result()
        for thread, photo in photos.items():  # the first to enter is the first to leave
            thread.submit(photo.__exit__, None, None, None).result()
    assert warnings.filters == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "AVIF", "HEIF"])
def test_content_decides_what_is_a_photo_and_no_ending(tmp_path, kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").from_pillow(a_photo()).save(tmp_path / "photo.heic")
    elif kind == "AVIF" and not hasattr(pytest.importorskip("PIL.AvifImagePlugin"), "SUPPORTED"):
        pytest.skip("Pillow without AVIF")
    else:
        a_photo().save(tmp_path / "photo.heic", kind)
    for name in ("photo.heic", "photo.jfif", "photo"):
        if name != "photo.heic":
            (tmp_path / name).write_bytes((tmp_path / "photo.heic").read_bytes())
        assert is_photo(tmp_path / name) and np.shape(decode_photo(tmp_path / name)) == (60, 90, 3)
    (tmp_path / "notes.jpg").write_text("no photo, whatever it is called")
    assert not is_photo(tmp_path / "notes.jpg") and not is_photo(tmp_path / "none.jpg")


def test_a_heic_without_its_package_names_it(tmp_path, monkeypatch):
    (tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PhotoError, match=r"photo.jpg: a HEIC, which needs pillow-heif; pip install 'kantu\[heic\]'"):
        decode_photo(tmp_path / "photo.jpg")
    assert is_photo(tmp_path / "photo.jpg"), "not passed over"


def test_a_photo_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    with pytest.raises(PhotoError, match="photo.jpg: not a file"):
        decode_photo(tmp_path / "photo.jpg")


def test_odd_tags_do_no_harm_to_the_pixels(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    a_photo().save(tmp_path / "photo.png", exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", lambda *_: pytest.fail("the tags are written"))
    assert open_photo(tmp_path / "photo.png").size == (60, 90)
    monkeypatch.setattr(Image.Image, "getexif", lambda _: 1 / 0)
    assert open_photo(tmp_path / "photo.png").size == (90, 60)


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.float32([[0.0, 0.5, 1.0]]), [0, 127, 255]),
        (np.float32([[-10, 0, 10]]), [0, 127, 255]),
        (np.float32([[np.nan, 5, 9]]), [0, 0, 255]),
        (np.int32([[0, 2**30, 2**31 - 1]]), [0, 127, 255]),
        (np.uint16([[0, 2048, 4095]]), [0, 127, 255]),  # 12 bits
        (np.uint16([[0, 128 * 257, 65535]]), [0, 128, 255]),
        (np.float32([[7, 7, 7]]), [0, 0, 0]),
    ],
)
def test_a_deep_tiff_is_scaled_by_its_range(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "photo.tif")
    found = np.asarray(open_photo(tmp_path / "photo.tif"))[0, :, 0]
    np.testing.assert_allclose(found, expected, atol=1)


# ---- resizing


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(640, 480), (333, 500), (90, 60), (32, 32), (32, 400), (20, 9), (1, 1), (1000, 1)])
def test_torch_resizes_like_pillow_to_two_grey_levels(interpolation, size):
    photo = a_photo(*size)
    one, other = (resize(photo, 32, interpolation).int() for resize in (resize_with_torch, resize_with_pillow))
    assert one.shape == other.shape == (3, 32, 32)
    assert (one - other).abs().max() <= 2 and (one - other).float().abs().mean() < 0.2
    assert resize_with_torch(photo, 32, interpolation).stride() == (1, 3 * 32, 3)  # channels-last: no copy is needed
    assert torch.equal(resize_with_torch(np.asarray(photo), 32, interpolation).int(), one)


RESIZE = """
import hashlib, numpy as np, torch
from captioning.encoders.images import resize_with_torch
rng = np.random.default_rng(0)
sha256 = hashlib.sha256()
for height, width in ((480, 640), (300, 199), (20, 30), (64, 500)):
    for interpolation in ("bilinear", "bicubic"):
        resized = resize_with_torch(rng.integers(0, 256, (height, width, 3), np.uint8), 64, interpolation)
        sha256.update(resized.contiguous().numpy().tobytes())
"""


def test_a_cpu_without_vector_instructions_resizes_to_the_same_bytes():
    here: dict = {}
    exec(RESIZE, here)
    printed = subprocess.run(
        [sys.executable, "-c", f"{RESIZE}\nprint(torch.backends.cpu.get_cpu_capability())\nprint(sha256.hexdigest())"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert printed[0] in ("DEFAULT", "NO AVX") and printed[1] == here["sha256"].hexdigest()


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
def test_files_and_runs_of_before_keep_pillows_decoding_byte_for_byte(tmp_path, name):
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 255, (300, 200, 3), np.uint8))
    photo.save(tmp_path / name)
    with Image.open(tmp_path / name) as opened:
        resized = opened.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    (old,) = read_photos([tmp_path / name], [0], OLD).photos
    assert torch.equal(old, expected)
    (new,) = read_photos([tmp_path / name], [0], replace(OLD, decoding=Transform().decoding)).photos
    assert not torch.equal(new, expected) and (new.int() - expected.int()).abs().max() <= 2


def test_a_transform_records_who_decodes_and_refuses_what_it_does_not_know():
    assert Transform().to_dict()["decoding"] == "simplejpeg+torch"
    assert Transform.from_dict(Transform().to_dict()) == Transform()
    assert OLD.decoding == "pillow" and Transform.from_dict(OLD.to_dict()) == OLD != Transform(32)
    with pytest.raises(UserError, match="decoding opencv: unknown"):
        Transform.from_dict({"decoding": "opencv"})


# ---- batches


def test_a_batch_of_a_worker_is_channels_last(tmp_path):
    a_photo().save(tmp_path / "photo.jpg")
    for transform in (Transform(32), OLD):
        [batch] = photo_batches([tmp_path / "photo.jpg"] * 3, [[0, 1, 2]], transform, 1)
        assert batch.photos.is_contiguous(memory_format=torch.channels_last) and batch.photos.dtype == torch.uint8
    assert read_photos([], [], Transform(32)).photos.shape == (0, 3, 32, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_their_order_and_skip_photos_that_cannot_be_read(tmp_path, workers):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        if i != 3:
            Image.new("RGB", (8, 8), (i, i, i)).save(path)
    batches = list(photo_batches(paths, [[0, 1], [2, 3], [4]], Transform(8), workers))
    assert [batch.indices for batch in batches] == [[0, 1], [2], [4]]
    assert [int(photo[0, 0, 0]) for batch in batches for photo in batch.photos] == [0, 1, 2, 4]
    assert [len(batch.failures) for batch in batches] == [0, 1, 0]


def test_too_many_unreadable_photos_stop_the_work():
    failures = FailureLimit(total=100, allowed=0.01)
    failures.add(["a.jpg: broken"])
    failures.add(["a.jpg: broken"])  # the same photo in the next epoch
    with pytest.raises(PhotoError, match="--allow-missing"):
        failures.add(["b.jpg: broken"])


def test_augmentation_is_a_function_of_seed_epoch_and_photo():
    photo, augment = np.asarray(a_photo()), Augment(flip=True, crop=0.7, seed=3)

    def augment_all():
        return [augment(photo, i, epoch, True) for i in range(4) for epoch in range(4)]

    augmented, repeated = augment_all(), augment_all()
    assert all(np.array_equal(one, other) for one, other in zip(augmented, repeated, strict=True))
    assert len({photo.tobytes() for photo in augmented}) == len(augmented)


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
@pytest.mark.parametrize("transform", [Transform(32), OLD], ids=["new", "old"])
def test_an_augmented_photo_is_the_crop_or_mirror_of_the_decoded_one(tmp_path, transform, name):
    a_photo().save(tmp_path / name)
    crop, mirror = (slice(5, 55), slice(10, 80)), (slice(None), slice(None, None, -1))
    decoded = open_photo(tmp_path / name)
    expected = {"crop": decoded.crop((10, 5, 80, 55)), "mirror": decoded.transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
    for kind, pixels in (("crop", crop), ("mirror", mirror)):
        (found,) = read_photos([tmp_path / name], [0], transform, lambda photo, _, pixels=pixels: photo[pixels]).photos
        assert torch.equal(found, transform.resize(expected[kind]))


def test_a_crop_keeps_at_least_its_fraction_and_stays_inside_the_photo():
    pixels = np.arange(90 * 60, dtype=np.uint32).reshape(60, 90)
    photo = np.stack([pixels >> 8, pixels & 255], 2).astype(np.uint8)
    for index in range(200):
        crop = Augment(crop=0.6)(photo, index, 0, True).astype(int)
        assert 0.6 * 60 - 1 <= crop.shape[0] <= 60 and 0.6 * 90 - 1 <= crop.shape[1] <= 90
        positions = crop[..., 0] * 256 + crop[..., 1]
        assert (np.diff(positions, axis=1) == 1).all() and (np.diff(positions, axis=0) == 90).all()
    tiny = np.zeros((1, 1, 3), np.uint8)
    assert Augment(crop=0.01)(tiny, 0, 0, True).shape == (1, 1, 3)


def test_half_of_the_photos_are_mirrored_but_none_that_may_not_be():
    photo = np.asarray(a_photo())
    mirror = photo[:, ::-1]
    augmented = [Augment(flip=True)(photo, i, 0, may_flip=True) for i in range(400)]
    mirrored = [np.array_equal(result, mirror) for result in augmented]
    assert 150 < sum(mirrored) < 250
    assert all(flip or np.array_equal(result, photo) for result, flip in zip(augmented, mirrored, strict=True))
    assert all(np.array_equal(Augment(flip=True)(photo, i, 0, may_flip=False), photo) for i in range(50))


@pytest.mark.parametrize("decoding", ["pillow", "simplejpeg+torch"])
def test_scaled_decoding_keeps_twice_the_image_size_and_hardly_changes_the_photo(tmp_path, decoding):
    large = Image.fromarray(np.random.default_rng(1).integers(0, 255, (30, 40, 3), np.uint8)).resize((1600, 1200))
    large.save(tmp_path / "large.jpg", quality=95)
    large.resize((90, 60)).save(tmp_path / "small.jpg")
    large.save(tmp_path / "large.png")
    plain, scaled = (Transform(96, scaled_decoding=scaled, decoding=decoding) for scaled in (False, True))
    shapes = {name: np.shape(scaled.open(tmp_path / name)) for name in ("large.jpg", "small.jpg", "large.png")}
    assert shapes == {"large.jpg": (300, 400, 3), "small.jpg": (60, 90, 3), "large.png": (1200, 1600, 3)}
    for min_side in (37, 100, 150, 151, 300, 599, 601):
        np.testing.assert_array_equal(*(f(tmp_path / "large.jpg", min_side) for f in (decode_photo, open_photo)))
    one, other = (transform.resize(transform.open(tmp_path / "large.jpg")).float() for transform in (plain, scaled))
    assert 0 < (one - other).abs().mean() < 1
    assert Transform.from_dict(scaled.to_dict()) == scaled != plain


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_scaled_decoding_preserves_the_colours_of_every_mode(tmp_path, mode):
    a_photo(900, 600).convert(mode).save(tmp_path / "photo.jpg", quality=95)
    plain, scaled = Transform(64), Transform(64, scaled_decoding=True)
    one, other = (transform.resize(transform.open(tmp_path / "photo.jpg")).float() for transform in (plain, scaled))
    assert (one - other).abs().mean() < 2
