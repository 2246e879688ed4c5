"""Batches: photos with all their captions, packed longest first."""

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


def make_dataset(all_captions, max_length=50):
    photos = [Photo(f"{i}.jpg", str(i), "train", c) for i, c in enumerate(all_captions)]
    return CaptionDataset(photos, VOCABULARY, max_length)


@given(st.lists(captions, min_size=1, max_size=5), st.randoms())
def test_packing_keeps_every_caption_of_every_photo(all_captions, random):
    dataset = make_dataset(all_captions)
    photos = list(range(len(all_captions)))
    random.shuffle(photos)
    words, targets, photo_index = dataset.pack(photos)
    inputs, lengths = pad_packed_sequence(words, batch_first=True)
    padded_targets, _ = pad_packed_sequence(type(words)(targets, words.batch_sizes), batch_first=True)
    packed = []
    for row, length in enumerate(lengths):
        caption = inputs[row, 1:length].tolist()
        assert inputs[row, 0] == START and padded_targets[row, :length].tolist() == caption + [END]
        packed.append((photos[photo_index[row]], tuple(VOCABULARY.decode(caption))))
    expected = [(i, caption) for i in photos for caption in all_captions[i]]
    assert sorted(packed) == sorted(expected)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


@given(st.lists(captions, min_size=1, max_size=12), st.integers(1, 10))
def test_a_plan_holds_every_photo_once_in_batches_of_at_most_batch_size_captions(all_captions, size):
    dataset = make_dataset(all_captions)
    plan = plan_batches(dataset, size, range(len(dataset)))
    assert np.concatenate(plan).tolist() == list(range(len(dataset)))
    for batch in plan:
        assert len(batch) == 1 or sum(dataset.num_captions(photo) for photo in batch) <= size


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_only():
    assert epoch_order(50, 1, 2).tolist() == epoch_order(50, 1, 2).tolist()
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert epoch_order(50, 1, 2).tolist() != epoch_order(50, 1, 3).tolist() != epoch_order(50, 2, 2).tolist()


def test_long_captions_are_truncated_and_counted():
    dataset = make_dataset([(("a",) * 9, ("a", "b"))], max_length=4)
    assert dataset.num_truncated == 1 and len(dataset.pack([0])[1]) == 5 + 3


def test_a_cached_batch_reads_the_rows_of_its_photos():
    dataset = make_dataset([(("a",),), (("b",),)])
    batch = CachedPhotos(dataset, np.array([10, 11]), lambda rows: rows.tolist())[np.array([1, 0])]
    assert batch.photos == [11, 10] and batch.photo_index.tolist() == [0, 1]


def test_a_live_batch_leaves_out_an_unreadable_photo_and_its_captions(small_data, tmp_path):
    photos = list(read_captions(small_data))[:3]
    missing = Photo(str(tmp_path / "gone.png"), "gone", "train", (("a",),))
    dataset = CaptionDataset([photos[0], missing, photos[2]], Vocabulary.load(small_data / VOCABULARY_FILE), 50)
    batch = LivePhotos(dataset, Transform(32))[np.array([0, 1, 2])]
    assert batch.photos.shape == (2, 3, 32, 32) and batch.indices.tolist() == [0, 2] and len(batch.failures) == 1
    assert batch.photo_index.max() == 1 and batch.num_captions == dataset.num_captions(0) + dataset.num_captions(2)
    with pytest.raises(PhotoError, match="gone.png"):
        LivePhotos(dataset, Transform(32))[np.array([1])]


def test_captions_take_one_or_two_bytes_per_word():
    dataset = make_dataset([(("a", "b"),)] * 1000)
    assert dataset.words.dtype == np.uint8 and dataset.words.nbytes == 2000
    assert make_dataset([(tuple(map(str, range(300))),)]).words.dtype == np.uint16
    assert torch.is_tensor(dataset.pack([0])[2])


def test_words_outside_the_vocabulary_are_unknown_in_batches_and_kept_in_references():
    caption = ("a", "yak", "<end>", "b", "gnu")
    dataset = make_dataset([(("a",),), (caption, ("yak",))], max_length=4)
    a, b = VOCABULARY.encode("ab")
    assert dataset.pack([1])[1].tolist() == [a, UNKNOWN, UNKNOWN, END, UNKNOWN, b, END]
    assert dataset.references(1) == [[*caption], ["yak"]]


@given(st.lists(captions, min_size=1, max_size=9), st.data())
def test_a_subset_has_the_ids_paths_and_captions_of_its_photos(all_captions, data):
    dataset = make_dataset(all_captions)
    indices = data.draw(st.lists(st.integers(0, len(all_captions) - 1), unique=True).map(sorted))
    subset = dataset.subset(np.array(indices, np.int64))
    assert [*subset.ids] == [str(i) for i in indices] and [*subset.paths] == [f"{i}.jpg" for i in indices]
    for i, photo in enumerate(indices):
        assert subset.references(i) == [[*caption] for caption in all_captions[photo]]
        assert all(torch.equal(*pair) for pair in zip(subset.pack([i])[1:], dataset.pack([photo])[1:], strict=True))
    assert subset.target_counts().tolist() == [sum(len(c) + 1 for c in all_captions[i]) for i in indices]


@pytest.mark.parametrize(
    "caption, expected",
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
def test_captions_that_mention_a_side_are_found_in_both_languages(caption, expected):
    assert make_dataset([(("a",),), (("a",), tuple(caption.split()))]).mentions_side().tolist() == [False, expected]


def test_a_live_photo_is_mirrored_unless_a_caption_mentions_a_side(small_data):
    photos = [photo for photo in read_captions(small_data) if photo.split == "train"]
    dataset = CaptionDataset(photos, Vocabulary.load(small_data / VOCABULARY_FILE), 20)
    transform = Transform(64)
    mentions_side = np.arange(len(photos)) % 2 == 0
    plain = LivePhotos(dataset, transform)
    augmented = LivePhotos(dataset, transform, Augment(flip=True), mentions_side)
    indices = np.arange(len(photos))
    mirrored = []
    for epoch in range(6):
        augmented.epoch = epoch
        changed, original = augmented[indices].photos, plain[indices].photos
        is_mirrored = [not torch.equal(one, other) for one, other in zip(changed, original, strict=True)]
        assert all(torch.equal(changed[i].flip(2), original[i]) for i in indices if is_mirrored[i])
        mirrored.append(is_mirrored)
    assert not np.array(mirrored)[:, ::2].any() and np.array(mirrored)[:, 1::2].any(0).all()


@given(st.lists(captions, min_size=1, max_size=9), st.integers(1, 7), st.integers(1, 4))
def test_an_update_counts_the_words_captions_and_photos_of_all_its_batches(all_captions, size, accumulation):
    dataset = make_dataset(all_captions)
    plan = plan_batches(dataset, size, range(len(dataset)))
    updates = plan_updates(dataset, plan, accumulation)
    assert [batch.tolist() for update in updates for batch in update.batches] == [batch.tolist() for batch in plan]
    for update in updates:
        packed = [dataset.pack(batch) for batch in update.batches]
        assert len(update.batches) <= accumulation
        assert update.words == sum(len(targets) for _, targets, _ in packed)
        assert update.captions == sum(len(photo_index) for _, _, photo_index in packed)
        assert update.photos == sum(map(len, update.batches))
