"""Every stage turns photos of every kind into the same tensor."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from captioning.encoders.images import Augment, FailureLimit, Transform, open_photo, photo_batches, to_rgb
from captioning.errors import PhotoError


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


def test_a_rotated_photo_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    a_photo(90, 60).save(tmp_path / "photo.jpg", exif=exif)
    assert open_photo(tmp_path / "photo.jpg").size == (60, 90)


def test_transparent_pixels_become_white():
    assert to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_an_unreadable_photo_is_named_with_its_reason(tmp_path):
    good = io.BytesIO()
    a_photo(300, 200).save(good, "JPEG")
    files = {"missing.jpg": None, "empty.jpg": b"", "text.jpg": b"hello", "short.jpg": good.getvalue()[:-2000]}
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(PhotoError, match=name):
            open_photo(tmp_path / name)
    with pytest.raises(PhotoError):
        open_photo(tmp_path)


def test_an_absurdly_large_photo_is_refused(tmp_path, monkeypatch):
    a_photo().save(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PhotoError, match="1,000 pixels"):
        open_photo(tmp_path / "photo.png")


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
    photo, augment = a_photo(), Augment(flip=True, crop=0.7, seed=3)

    def augment_all():
        return [np.asarray(augment(photo, i, epoch, True).resize((8, 8))) for i in range(4) for epoch in range(4)]

    augmented, repeated = augment_all(), augment_all()
    assert all(np.array_equal(one, other) for one, other in zip(augmented, repeated, strict=True))
    assert len({photo.tobytes() for photo in augmented}) == len(augmented)


def test_a_crop_keeps_at_least_its_fraction_and_stays_inside_the_photo():
    pixels = np.arange(90 * 60, dtype=np.uint32).reshape(60, 90)
    photo = Image.fromarray(np.stack([pixels >> 8, pixels & 255, pixels * 0 + 255], 2).astype(np.uint8))
    for index in range(200):
        crop = np.asarray(Augment(crop=0.6)(photo, index, 0, True)).astype(int)
        assert 0.6 * 60 - 1 <= crop.shape[0] <= 60 and 0.6 * 90 - 1 <= crop.shape[1] <= 90
        positions = crop[..., 0] * 256 + crop[..., 1]
        assert (crop[..., 2] == 255).all()  # PIL fills what lies outside a photo with black
        assert (np.diff(positions, axis=1) == 1).all() and (np.diff(positions, axis=0) == 90).all()
    tiny = Image.new("RGB", (1, 1))
    assert Augment(crop=0.01)(tiny, 0, 0, True).size == (1, 1)


def test_half_of_the_photos_are_mirrored_but_none_that_may_not_be():
    photo = a_photo()
    mirror = np.asarray(photo)[:, ::-1]
    augmented = [np.asarray(Augment(flip=True)(photo, i, 0, may_flip=True)) for i in range(400)]
    mirrored = [np.array_equal(result, mirror) for result in augmented]
    assert 150 < sum(mirrored) < 250
    assert all(flip or np.array_equal(result, photo) for result, flip in zip(augmented, mirrored, strict=True))
    assert all(np.array_equal(Augment(flip=True)(photo, i, 0, may_flip=False), photo) for i in range(50))


def test_scaled_decoding_keeps_twice_the_image_size_and_hardly_changes_the_photo(tmp_path):
    large = Image.fromarray(np.random.default_rng(1).integers(0, 255, (30, 40, 3), np.uint8)).resize((1600, 1200))
    large.save(tmp_path / "large.jpg", quality=95)
    large.resize((90, 60)).save(tmp_path / "small.jpg")
    large.save(tmp_path / "large.png")
    plain, scaled = Transform(96), Transform(96, scaled_decoding=True)
    sizes = {name: scaled.open(tmp_path / name).size for name in ("large.jpg", "small.jpg", "large.png")}
    assert sizes == {"large.jpg": (400, 300), "small.jpg": (90, 60), "large.png": (1600, 1200)}
    one, other = (transform.resize(transform.open(tmp_path / "large.jpg")).float() for transform in (plain, scaled))
    assert 0 < (one - other).abs().mean() < 1
    assert Transform.from_dict(scaled.to_dict()) == scaled != plain == Transform.from_dict({"image_size": 96})


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_scaled_decoding_preserves_the_colours_of_every_mode(tmp_path, mode):
    a_photo(900, 600).convert(mode).save(tmp_path / "photo.jpg", quality=95)
    plain, scaled = Transform(64), Transform(64, scaled_decoding=True)
    one, other = (transform.resize(transform.open(tmp_path / "photo.jpg")).float() for transform in (plain, scaled))
    assert (one - other).abs().mean() < 2
