"""The reward is pycocoevalcap's CIDEr-D, with <end> as a word."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

import captioning.training.cider_reward as module
from captioning.dataset.caption_dataset import CaptionDataset
from captioning.training.cider_reward import CiderReward
from preprocess.captions import Photo, read_captions
from preprocess.vocabulary import END, SPECIAL, Vocabulary

KNOWN = ("a", "dog", "runs", "on", "grass", "man", "two")
VOCABULARY = Vocabulary("en", "whitespace", 1, SPECIAL + KNOWN)
references = st.lists(
    st.lists(st.sampled_from([*KNOWN, "unicorn", "yak"]), min_size=1, max_size=8).map(tuple), min_size=1, max_size=4
).map(tuple)
candidates = st.lists(st.sampled_from(KNOWN), max_size=8)


def reward_of(photos, vocabulary=VOCABULARY):
    """photos: the captions of each."""
    return CiderReward(CaptionDataset((Photo("", "", "train", captions) for captions in photos), vocabulary, 5))


def padded(captions, ended=True):
    rows = np.zeros((len(captions), max(map(len, captions)) + 1), np.int64)
    for row, caption in zip(rows, captions, strict=True):
        numbers = [*VOCABULARY.encode(caption), *[END] * ended]
        row[: len(numbers)] = numbers
    return rows


def theirs(photos, captions):
    ours = {i: [" ".join([*caption, "<end>"]) for caption in photo] for i, photo in enumerate(photos)}
    return Cider().compute_score(ours, {i: [" ".join([*caption, "<end>"])] for i, caption in enumerate(captions)})[1]


@given(st.lists(st.tuples(references, candidates), min_size=1, max_size=7))
def test_each_score_is_pycocoevalcaps(pairs):
    """Also with references of unknown words, empty captions, and photos with different numbers of references."""
    photos, captions = zip(*pairs, strict=True)
    found = reward_of(photos)(np.arange(len(photos)), padded(captions))
    np.testing.assert_allclose(found, theirs(photos, captions), rtol=1e-9, atol=1e-12)


@given(st.lists(references, min_size=2, max_size=6), st.lists(candidates, min_size=1, max_size=9), st.data())
def test_several_captions_of_some_photos_in_any_order_score_as_alone(photos, captions, data):
    whose = np.array(
        data.draw(st.lists(st.integers(0, len(photos) - 1), min_size=len(captions), max_size=len(captions)))
    )
    reward = reward_of(photos)
    together = reward(whose, padded(captions))
    alone = [reward(whose[i : i + 1], padded(captions[i : i + 1]))[0] for i in range(len(captions))]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_real_captions_score_as_pycocoevalcap_scores_them(small_data, monkeypatch):
    photos = list(read_captions(small_data))
    vocabulary = Vocabulary.load(small_data / "vocab.json")
    captions = [photos[(3 * i) % len(photos)].captions[0][: 4 + i % 5] for i in range(len(photos))]
    numbers = [vocabulary.encode(caption) for caption in captions]
    rows = np.zeros((len(photos), 12), np.int64)
    for row, caption in zip(rows, numbers, strict=True):
        row[: len(caption) + 1] = [*caption, END]
    words = [vocabulary.decode(caption) for caption in numbers]
    expected = theirs([photo.captions for photo in photos], words)
    assert expected.max() > 1
    for at_once in (10_000, 5):  # document frequencies are counted in parts
        monkeypatch.setattr(module, "PHOTOS_AT_ONCE", at_once)
        found = reward_of([photo.captions for photo in photos], vocabulary)(np.arange(len(photos)), rows)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_caption_that_breaks_off_scores_less_than_one_that_ends():
    photos = [[("a", "dog", "runs")], [("two", "man")], [("grass",)]]
    reward = reward_of(photos)
    whole, broken = (reward(np.array([0]), padded([("a", "dog", "runs")], ended))[0] for ended in (True, False))
    assert whole == pytest.approx(10) and broken < 0.9 * whole
