"""The Python interface: a photo or a list, in any form, from any number of threads."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captioning import captioner as room
from captioning.captioner import Captioner
from captioning.decoders import DECODERS
from captioning.errors import PhotoError, UserError
from captioning.search.options import SearchOptions

SEARCH = SearchOptions(length_penalty=9.0, max_length=6)  # trained so little, the runs would say nothing
PHOTOS = [f"data/small/photos/{i}.png" for i in range(8)]


def tensor(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_a_path_an_image_and_a_tensor_of_bytes_or_of_floats_give_the_same_caption(here):
    captioner = Captioner.load("checkpoints/attention", precision="float32")
    for path in PHOTOS[:3]:
        expected = captioner.caption(path, SEARCH)
        forms = [Path(path), Image.open(path), tensor(path), tensor(path) / 255, (tensor(path) / 255).double()]
        mixed = captioner.caption(forms, SEARCH)
        assert expected.text and [caption.text for caption in mixed] == [expected.text] * 5
        for form, caption in zip(forms, mixed, strict=True):
            torch.testing.assert_close(captioner.caption(form, SEARCH).attention, expected.attention)
            assert caption.log_probability == pytest.approx(expected.log_probability, abs=1e-4)


def test_a_tensor_of_floats_is_that_of_the_nearest_bytes():
    bytes = torch.arange(256, dtype=torch.uint8).repeat(3, 1, 1)
    for almost in (bytes / 255, (bytes / 255 + 0.4 / 255).clamp(max=1), (bytes / 255 - 0.4 / 255).clamp(min=0)):
        assert np.array_equal(np.asarray(room._tensor_to_image(almost)), bytes.permute(1, 2, 0))


def test_a_list_gives_a_list_however_long_and_a_photo_gives_a_caption(here, monkeypatch):
    captioner = Captioner.load("checkpoints/attention", precision="float32")
    assert captioner.caption([]) == []
    expected = [captioner.caption(path, SEARCH).text for path in PHOTOS]
    monkeypatch.setattr(room, "BATCH_SIZE", 3)
    assert [caption.text for caption in captioner.caption(PHOTOS, SEARCH)] == expected


@pytest.mark.parametrize(
    "photo, reason",
    [
        (torch.zeros(8, 8, 3), r"float32 of shape \(8, 8, 3\): must be \(3, H, W\)"),
        (torch.zeros(2, 3, 8, 8), "must be"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64"),
        (torch.linspace(-2, 2, 192).view(3, 8, 8), "before normalisation"),
        (torch.full((3, 8, 8), torch.nan), "outside 0..1"),
        ("none.jpg", "no such file"),
    ],
)
def test_what_is_no_photo_is_refused_in_a_line(here, photo, reason):
    with pytest.raises(PhotoError, match=reason) as error:
        Captioner.load("checkpoints/attention").caption([PHOTOS[0], photo])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("run", DECODERS)
def test_threads_caption_as_one_does(here, run):
    alone = Captioner.load(f"checkpoints/{run}", precision="float32")
    expected = [alone.caption(path, SEARCH) for path in PHOTOS]
    assert all(caption.words for caption in expected)
    shared = Captioner.load(f"checkpoints/{run}", precision="float32")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(partial(shared.caption, search=SEARCH), PHOTOS * 3))
    for one, other in zip(found, expected * 3, strict=True):
        assert (one.text, one.log_probability, one.sentinel) == (other.text, other.log_probability, other.sentinel)
        assert one.attention is None or torch.equal(one.attention, other.attention)


def test_threads_load_the_encoder_once(here, monkeypatch):
    loads, plain = [], room.encoder_from_checkpoint

    def slow(checkpoint):
        loads.append(1)
        time.sleep(0.05)
        return plain(checkpoint)

    monkeypatch.setattr(room, "encoder_from_checkpoint", slow)
    captioner = Captioner.load("checkpoints/attention", precision="float32")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(captioner.caption, PHOTOS))
    assert len(loads) == 1


def test_several_captions_of_a_photo_come_with_the_best_one(here):
    captioner, search = (
        Captioner.load("checkpoints/attention", precision="float32"),
        SearchOptions(6, 4, num_captions=3),
    )
    best = captioner.caption(PHOTOS[0], search)
    assert len({best.text, *(other.text for other in best.others)}) == 3
    ranks = [caption.log_probability for caption in (best, *best.others) if caption.finished]
    assert ranks == sorted(ranks, reverse=True)
    drawn = captioner.caption(PHOTOS[:2], SearchOptions(max_length=4, num_captions=9, temperature=2.0, top_p=0.9))
    assert [len(caption.others) for caption in drawn] == [8, 8]


def test_runs_write_together_where_they_know_the_same_words_and_photos(here, tmp_path):
    alone = Captioner.load("checkpoints/attention", precision="float32")
    both = Captioner.load("checkpoints/attention", precision="float32", ensemble=["checkpoints/attention"])
    expected, found = alone.caption(PHOTOS, SEARCH), both.caption(PHOTOS, SEARCH)
    assert [caption.text for caption in found] == [caption.text for caption in expected]
    mixed = Captioner.load("checkpoints/attention", precision="float32", ensemble=["checkpoints/lstm"])
    changed = mixed.caption(PHOTOS, SEARCH)
    assert [caption.log_probability for caption in changed] != [caption.log_probability for caption in expected]
    assert changed[0].attention is not None
    other = torch.load("checkpoints/lstm/best.pt", weights_only=True)
    other["vocabulary"]["words"][-1] = "another"
    torch.save(other, tmp_path / "best.pt")
    with pytest.raises(UserError, match="another vocabulary or encoder than checkpoints/attention"):
        Captioner.load("checkpoints/attention", ensemble=[tmp_path])
