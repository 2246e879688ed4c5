"""The Python interface: one photo or several, of any type, from any number of threads."""

import io
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioning import captioner as captioner_module
from captioning.captioner import Captioner
from captioning.decoders import DECODERS
from captioning.encoders.images import PILLOW, Transform
from captioning.encoders.photo_objects import array_to_pixels, open_photo_object, tensor_to_pixels
from captioning.errors import PhotoError, UserError
from captioning.search.graphs import DecodingGraphs
from captioning.search.options import SearchOptions

# without the length penalty, runs of so few epochs return empty captions
SEARCH = SearchOptions(length_penalty=9.0, max_length=6)
TRUNCATED = io.BytesIO()
Image.effect_noise((64, 64), 50).save(TRUNCATED, "PNG")
TRUNCATED = TRUNCATED.getvalue()[:2000]
PHOTOS = [f"data/small/photos/{i}.png" for i in range(8)]


def load_tensor(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def photo_objects(path):
    """The photo as every type that is taken."""
    pixels, data = load_tensor(path), Path(path).read_bytes()
    array = pixels.permute(1, 2, 0).numpy()
    alpha = np.concatenate([array, np.full_like(array[:, :, :1], 255)], 2)
    tensors = [pixels, pixels / 255, (pixels / 255).double(), (pixels / 255).requires_grad_()]
    arrays = [array, array / 255, array.astype(np.float32) / 255, array[:, ::-1][:, ::-1], alpha]
    return [Path(path), Image.open(path), *tensors, *arrays, data, bytearray(data), memoryview(data), io.BytesIO(data)]


def test_paths_images_arrays_tensors_bytes_and_files_give_the_same_caption(here):
    captioner = Captioner.load("checkpoints/attention", precision="float32")
    for path in PHOTOS[:2]:
        expected = captioner.caption(path, SEARCH)
        photos = photo_objects(path)
        for photo, caption in zip(photos, captioner.caption(photos, SEARCH), strict=True):
            assert expected.text and caption.text == expected.text, type(photo)
            assert caption.log_probability == pytest.approx(expected.log_probability, abs=1e-4)
    for photo in photos:
        torch.testing.assert_close(captioner.caption(photo, SEARCH).attention, expected.attention)


def test_open_files_are_taken_wherever_they_come_from_and_stay_open(here, tmp_path):
    transform = Captioner.load("checkpoints/attention").encoder.transform
    expected = np.asarray(transform.open(PHOTOS[0]))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(PHOTOS[0], "0.png")
    with open(PHOTOS[0], "rb") as file, zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("0.png") as member:
        for photo in (file, file, member):
            assert np.array_equal(np.asarray(open_photo_object(photo, transform)), expected)
        assert not file.closed


def test_a_jpeg_in_memory_has_the_pixels_of_its_file(tmp_path):
    """Both ways of decoding: simplejpeg's, and Pillow's for a photo that lies on its side."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for extra in ({}, {"exif": exif}):
        image.save(tmp_path / "a.jpg", **extra)
        for transform in (Transform(), Transform(decoding=PILLOW)):
            pixels = open_photo_object((tmp_path / "a.jpg").read_bytes(), transform)
            assert np.array_equal(np.asarray(pixels), np.asarray(transform.open(tmp_path / "a.jpg")))


def test_several_photos_may_be_any_iterable_and_an_array_of_paths(here):
    captioner = Captioner.load("checkpoints/attention", precision="float32")
    expected = [caption.text for caption in captioner.caption(PHOTOS[:2], SEARCH)]
    for photos in (tuple(PHOTOS[:2]), iter(PHOTOS[:2]), np.array(PHOTOS[:2]), map(Path, PHOTOS[:2])):
        assert [caption.text for caption in captioner.caption(photos, SEARCH)] == expected


def test_floating_point_tensors_are_rounded_to_the_nearest_level():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)
    exact = levels / 255
    for photo in (exact, (exact + 0.4 / 255).clamp(max=1), (exact - 0.4 / 255).clamp(min=0)):
        assert np.array_equal(tensor_to_pixels(photo), levels.permute(1, 2, 0))
        assert np.array_equal(array_to_pixels(photo.permute(1, 2, 0).numpy()), levels.permute(1, 2, 0))


def test_one_photo_gives_a_caption_and_a_list_of_any_length_gives_a_list(here, monkeypatch):
    captioner = Captioner.load("checkpoints/attention", precision="float32")
    assert captioner.caption([]) == []
    expected = [captioner.caption(path, SEARCH).text for path in PHOTOS]
    monkeypatch.setattr(captioner_module, "BATCH_SIZE", 3)
    assert [caption.text for caption in captioner.caption(PHOTOS, SEARCH)] == expected


@pytest.mark.parametrize(
    "photo, message",
    [
        (torch.zeros(8, 8, 3), r"float32 of shape \(8, 8, 3\): must be \(3, H, W\)"),
        (torch.zeros(2, 3, 8, 8), "must be"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        (torch.linspace(-2, 2, 192).view(3, 8, 8), "before normalisation"),
        (torch.full((3, 8, 8), torch.nan), "outside 0..1"),
        (torch.zeros(3, 0, 8), r"shape \(3, 0, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 of shape \(3, 8, 8\): must be \(H, W, 3\)"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        (np.full((8, 8, 3), 2.0), "before normalisation"),
        ("none.jpg", "no such file"),
        ("A" * 5000, "5,000 characters are not a path"),
        (b"no photo", "^photo of 8 bytes: not an image$"),
        (io.BytesIO(b"no photo"), "^photo of type BytesIO: not an image$"),
        (io.StringIO("no photo"), "was opened as text; open it with 'rb'"),
        (Image.open(io.BytesIO(TRUNCATED)), "PIL image: image file is truncated"),
        ({"path": "a.jpg"}, "^photo of type dict: give a path, a PIL image"),
        ([np.zeros((8, 8, 3))], "^photo of type list: "),
        (Path, "^photo of type type: "),
        (None, "^photo of type NoneType: "),
        (SEARCH, "^photo of type captioning.search.options.SearchOptions: "),
    ],
)
def test_an_invalid_photo_is_refused_with_a_one_line_message(here, photo, message):
    with pytest.raises(PhotoError, match=message) as error:
        Captioner.load("checkpoints/attention").caption([PHOTOS[0], photo])
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("photos", [None, 3, {"path": "a.jpg"}, {"a.jpg"}, Captioner])
def test_an_object_that_holds_no_photos_is_named_by_its_type(here, photos):
    with pytest.raises(PhotoError, match=f"^photo of type {type(photos).__name__}: give a path"):
        Captioner.load("checkpoints/attention").caption(photos)


@pytest.mark.parametrize("run", DECODERS)
def test_threads_get_the_captions_of_a_single_thread(here, run, times):
    single = Captioner.load(f"checkpoints/{run}", precision="float32")
    photos, rounds = PHOTOS[: times(4, 8)], times(2, 3)
    expected = [single.caption(path, SEARCH) for path in photos]
    assert all(caption.words for caption in expected)
    shared = Captioner.load(f"checkpoints/{run}", precision="float32")
    with ThreadPoolExecutor(4) as pool:
        captions = list(pool.map(partial(shared.caption, search=SEARCH), photos * rounds))
    for one, other in zip(captions, expected * rounds, strict=True):
        assert (one.text, one.log_probability, one.sentinel) == (other.text, other.log_probability, other.sentinel)
        assert one.attention is None or torch.equal(one.attention, other.attention)


def test_threads_that_share_cuda_graphs_get_the_captions_of_a_single_thread(here):
    """A CPU repeats the work of the graphs: a search must not overwrite the results of another thread's."""
    single = Captioner.load("checkpoints/attention", precision="float32")
    assert single._graphs is None
    shared = Captioner.load("checkpoints/attention", precision="float32")
    shared._graphs = DecodingGraphs(lambda work: work)
    batches = [PHOTOS[:3], PHOTOS[3:6], PHOTOS[6:7], PHOTOS[7:]]
    expected = [single.caption(batch, SEARCH) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        captions = list(pool.map(partial(shared.caption, search=SEARCH), batches * 3))
    for batch, expected_batch in zip(captions, expected * 3, strict=True):
        for one, other in zip(batch, expected_batch, strict=True):
            assert one.text == other.text and one.log_probability == pytest.approx(other.log_probability, abs=1e-5)
            torch.testing.assert_close(one.attention, other.attention)
    assert any(loop.replays for loop in shared._graphs.loops.values())


def test_threads_load_the_encoder_once(here, monkeypatch):
    loads = []
    load_encoder = captioner_module.encoder_from_checkpoint

    def load_slowly(checkpoint):
        loads.append(checkpoint)
        time.sleep(0.05)
        return load_encoder(checkpoint)

    monkeypatch.setattr(captioner_module, "encoder_from_checkpoint", load_slowly)
    captioner = Captioner.load("checkpoints/attention", precision="float32")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(captioner.caption, PHOTOS))
    assert len(loads) == 1


def test_further_captions_of_a_photo_come_with_the_best_one(here):
    captioner = Captioner.load("checkpoints/attention", precision="float32")
    best = captioner.caption(PHOTOS[0], SearchOptions(6, 4, num_captions=3))
    assert len({best.text, *(other.text for other in best.others)}) == 3
    scores = [caption.log_probability for caption in (best, *best.others) if caption.finished]
    assert scores == sorted(scores, reverse=True)
    samples = captioner.caption(PHOTOS[:2], SearchOptions(max_length=4, num_captions=9, temperature=2.0, top_p=0.9))
    assert [len(caption.others) for caption in samples] == [8, 8]


def test_an_ensemble_needs_runs_of_one_vocabulary_and_encoder(here, tmp_path):
    single = Captioner.load("checkpoints/attention", precision="float32")
    twice = Captioner.load("checkpoints/attention", precision="float32", ensemble=["checkpoints/attention"])
    expected, captions = single.caption(PHOTOS, SEARCH), twice.caption(PHOTOS, SEARCH)
    assert [caption.text for caption in captions] == [caption.text for caption in expected]
    mixed = Captioner.load("checkpoints/attention", precision="float32", ensemble=["checkpoints/lstm"])
    changed = mixed.caption(PHOTOS, SEARCH)
    assert [caption.log_probability for caption in changed] != [caption.log_probability for caption in expected]
    assert changed[0].attention is not None
    other = torch.load("checkpoints/lstm/best.pt", weights_only=True)
    other["vocabulary"]["words"][-1] = "another"
    torch.save(other, tmp_path / "best.pt")
    with pytest.raises(UserError, match="another vocabulary or encoder than checkpoints/attention"):
        Captioner.load("checkpoints/attention", ensemble=[tmp_path])


def test_argmax_attention_needs_a_hard_attention_run(here):
    captioner = Captioner.load("checkpoints/hard-attention", precision="float32", hard_attention="argmax")
    attention = captioner.caption(PHOTOS[0], SEARCH).attention
    assert attention is not None
    with pytest.raises(UserError, match="--hard argmax: needs a run of --decoder hard-attention, but this is lstm"):
        Captioner.load("checkpoints/lstm", hard_attention="argmax")
