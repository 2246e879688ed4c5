"""One photo with all its captions, longest first, packed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_packed_sequence

from captioning.dataset.batches import CachedPhotos, LivePhotos, epoch_order, plan_batches, plan_updates
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.encoders.images import Augment, Transform
from captioning.errors import PhotoError
from preprocess.captions import Photo, read_captions
from preprocess.vocabulary import END, START, UNKNOWN, VOCABULARY_FILE, Vocabulary

WORDS = ["a", "b", "c", "d"]
VOCABULARY = Vocabulary.build([WORDS], language="en", tokenizer="whitespace", min_count=1, max_words=9)
captions = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(tuple), min_size=1, max_size=4).map(
    tuple
)


def split_of(all_captions, max_length=50):
    photos = [Photo(f"{i}.jpg", str(i), "train", c) for i, c in enumerate(all_captions)]
    return CaptionDataset(photos, VOCABULARY, max_length)


@given(st.lists(captions, min_size=1, max_size=5), st.randoms())
def test_packing_loses_and_adds_nothing(all_captions, random):
    split = split_of(all_captions)
    photos = list(range(len(all_captions)))
    random.shuffle(photos)
    words, targets, photo = split.pack(photos)
    read, lengths = pad_packed_sequence(words, batch_first=True)
    said, _ = pad_packed_sequence(type(words)(targets, words.batch_sizes), batch_first=True)
    found = []
    for row, length in enumerate(lengths):
        caption = read[row, 1:length].tolist()
        assert read[row, 0] == START and said[row, :length].tolist() == caption + [END]
        found.append((photos[photo[row]], tuple(VOCABULARY.decode(caption))))
    expected = [(i, caption) for i in photos for caption in all_captions[i]]
    assert sorted(found) == sorted(expected)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


@given(st.lists(captions, min_size=1, max_size=12), st.integers(1, 10))
def test_a_plan_takes_every_photo_once_and_keeps_to_the_size(all_captions, size):
    split = split_of(all_captions)
    plan = plan_batches(split, size, range(len(split)))
    assert np.concatenate(plan).tolist() == list(range(len(split)))
    for batch in plan:
        assert len(batch) == 1 or sum(split.captions_of(photo) for photo in batch) <= size


def test_an_epochs_order_is_a_function_of_seed_and_epoch():
    assert epoch_order(50, 1, 2).tolist() == epoch_order(50, 1, 2).tolist()
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert epoch_order(50, 1, 2).tolist() != epoch_order(50, 1, 3).tolist() != epoch_order(50, 2, 2).tolist()


def test_captions_too_long_are_cut_and_counted():
    split = split_of([(("a",) * 9, ("a", "b"))], max_length=4)
    assert split.num_truncated == 1 and len(split.pack([0])[1]) == 5 + 3


def test_a_cached_batch_has_the_features_of_its_photos():
    split = split_of([(("a",),), (("b",),)])
    batch = CachedPhotos(split, np.array([10, 11]), lambda rows: rows.tolist())[np.array([1, 0])]
    assert batch.photos == [11, 10] and batch.photo_index.tolist() == [0, 1]


def test_a_live_batch_leaves_out_a_broken_photo_and_its_captions(small_data, tmp_path):
    photos = list(read_captions(small_data))[:3]
    broken = Photo(str(tmp_path / "gone.png"), "gone", "train", (("a",),))
    split = CaptionDataset([photos[0], broken, photos[2]], Vocabulary.load(small_data / VOCABULARY_FILE), 50)
    batch = LivePhotos(split, Transform(32))[np.array([0, 1, 2])]
    assert batch.photos.shape == (2, 3, 32, 32) and batch.indices.tolist() == [0, 2] and len(batch.failures) == 1
    assert batch.photo_index.max() == 1 and batch.num_captions == split.captions_of(0) + split.captions_of(2)
    with pytest.raises(PhotoError, match="gone.png"):
        LivePhotos(split, Transform(32))[np.array([1])]


def test_memory_is_flat_arrays_a_byte_or_two_a_word():
    split = split_of([(("a", "b"),)] * 1000)
    assert split.words.dtype == np.uint8 and split.words.nbytes == 2000
    assert split_of([(tuple(map(str, range(300))),)]).words.dtype == np.uint16
    assert torch.is_tensor(split.pack([0])[2])


def test_words_that_the_vocabulary_lacks_are_unknown_to_a_decoder_and_kept_for_the_scores():
    caption = ("a", "yak", "<end>", "b", "gnu")
    split = split_of([(("a",),), (caption, ("yak",))], max_length=4)
    a, b = VOCABULARY.encode("ab")
    assert split.pack([1])[1].tolist() == [a, UNKNOWN, UNKNOWN, END, UNKNOWN, b, END]
    assert split.references(1) == [[*caption], ["yak"]]


@given(st.lists(captions, min_size=1, max_size=9), st.data())
def test_photos_that_are_kept_are_as_they_were(all_captions, data):
    split = split_of(all_captions)
    kept = data.draw(st.lists(st.integers(0, len(all_captions) - 1), unique=True).map(sorted))
    part = split.subset(np.array(kept, np.int64))
    assert [*part.ids] == [str(i) for i in kept] and [*part.paths] == [f"{i}.jpg" for i in kept]
    for place, photo in enumerate(kept):
        assert part.references(place) == [[*caption] for caption in all_captions[photo]]
        assert all(torch.equal(*pair) for pair in zip(part.pack([place])[1:], split.pack([photo])[1:], strict=True))
    assert part.target_counts().tolist() == [sum(len(c) + 1 for c in all_captions[i]) for i in kept]


@pytest.mark.parametrize(
    "words, sides",
    [
        ("a man on the left", True),
        ("the rightmost dog", True),
        ("his right-hand side", True),
        ("a bright light", False),
        ("右边 的 男人", True),
        ("左手 拿 着 球", True),
        ("向左转", True),
        ("一个 男人", False),
    ],
)
def test_captions_that_tell_left_from_right_are_known_in_both_languages(words, sides):
    assert split_of([(("a",),), (("a",), tuple(words.split()))]).mentions_side().tolist() == [False, sides]


def test_a_live_photo_is_mirrored_unless_its_captions_tell_sides(small_data):
    photos = [p for p in read_captions(small_data) if p.split == "train"]
    split, transform = CaptionDataset(photos, Vocabulary.load(small_data / VOCABULARY_FILE), 20), Transform(64)
    sided = np.arange(len(photos)) % 2 == 0
    plain, live = LivePhotos(split, transform), LivePhotos(split, transform, Augment(flip=True), sided)
    everything, mirrored = np.arange(len(photos)), []
    for epoch in range(6):
        live.epoch = epoch
        seen, true = live[everything].photos, plain[everything].photos
        flips = [not torch.equal(one, other) for one, other in zip(seen, true, strict=True)]
        assert all(torch.equal(seen[i].flip(2), true[i]) for i in everything if flips[i])
        mirrored.append(flips)
    assert not np.array(mirrored)[:, ::2].any() and np.array(mirrored)[:, 1::2].any(0).all()


@given(st.lists(captions, min_size=1, max_size=9), st.integers(1, 7), st.integers(1, 4))
def test_an_update_counts_the_words_and_captions_of_all_its_batches(all_captions, size, accumulate):
    split = split_of(all_captions)
    plan = plan_batches(split, size, range(len(split)))
    updates = plan_updates(split, plan, accumulate)
    assert [batch.tolist() for update in updates for batch in update.batches] == [batch.tolist() for batch in plan]
    for update in updates:
        packed = [split.pack(batch) for batch in update.batches]
        assert len(update.batches) <= accumulate
        assert update.words == sum(len(targets) for _, targets, _ in packed)
        assert update.captions == sum(len(photo) for _, _, photo in packed)
        assert update.photos == sum(map(len, update.batches))
