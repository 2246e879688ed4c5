"""One photo with all its captions, longest first, packed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_packed_sequence

from captioning.batches import CachedPhotos, LivePhotos, plan_batches, shuffled
from captioning.images import PhotoError, Transform
from captioning.splits import Split
from preprocess.captions import Photo, read_captions
from preprocess.vocabulary import END, START, VOCABULARY_FILE, Vocabulary

WORDS = ["a", "b", "c", "d"]
VOCABULARY = Vocabulary.build([WORDS], language="en", tokenizer="whitespace", min_count=1, max_words=9)
captions = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(tuple), min_size=1, max_size=4).map(
    tuple
)


def split_of(all_captions, max_length=50):
    photos = [Photo(f"{i}.jpg", str(i), "train", c) for i, c in enumerate(all_captions)]
    return Split(photos, VOCABULARY, max_length)


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
    assert shuffled(50, 1, 2).tolist() == shuffled(50, 1, 2).tolist()
    assert sorted(shuffled(50, 1, 2)) == list(range(50))
    assert shuffled(50, 1, 2).tolist() != shuffled(50, 1, 3).tolist() != shuffled(50, 2, 2).tolist()


def test_captions_too_long_are_cut_and_counted():
    split = split_of([(("a",) * 9, ("a", "b"))], max_length=4)
    assert split.cut == 1 and len(split.pack([0])[1]) == 5 + 3


class FakeReader:
    rows = {"0": 10, "1": 11}

    def read(self, rows):
        return ("cells", rows.tolist())

    def read_pooled(self, rows):
        return ("pooled", rows.tolist())


def test_a_decoder_without_attention_reads_the_pooled_map_alone():
    split = split_of([(("a",),), (("b",),)])
    assert CachedPhotos(split, FakeReader(), sees_cells=True)[np.array([1, 0])].view == ("cells", [11, 10])
    assert CachedPhotos(split, FakeReader(), sees_cells=False)[np.array([1, 0])].view == ("pooled", [11, 10])


def test_a_live_batch_leaves_out_a_broken_photo_and_its_captions(small_data, tmp_path):
    photos = list(read_captions(small_data))[:3]
    broken = Photo(str(tmp_path / "gone.png"), "gone", "train", (("a",),))
    split = Split([photos[0], broken, photos[2]], Vocabulary.load(small_data / VOCABULARY_FILE), 50)
    batch = LivePhotos(split, Transform(32))[np.array([0, 1, 2])]
    assert batch.view.shape == (2, 3, 32, 32) and batch.indices.tolist() == [0, 2] and len(batch.failures) == 1
    assert batch.photo.max() == 1 and batch.captions == split.captions_of(0) + split.captions_of(2)
    with pytest.raises(PhotoError, match="gone.png"):
        LivePhotos(split, Transform(32))[np.array([1])]


def test_memory_is_flat_arrays():
    split = split_of([(("a", "b"),)] * 1000)
    assert split.words.dtype == np.int32 and split.words.nbytes == 8000
    assert torch.is_tensor(split.pack([0])[2])
