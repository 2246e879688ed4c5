"""The CIDEr-D reward, against pycocoevalcap's CIDEr-D with <end> as a word."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from captioning.dataset.caption_dataset import CaptionDataset
from captioning.training.cider_reward import CiderReward
from preprocess.captions import Photo, read_captions
from preprocess.vocabulary import END, SPECIAL, Vocabulary

WORDS = ("a", "dog", "runs", "on", "grass", "man", "two")
VOCABULARY = Vocabulary("en", "whitespace", 1, SPECIAL + WORDS)
references = st.lists(
    st.lists(st.sampled_from([*WORDS, "unicorn", "yak"]), min_size=1, max_size=8).map(tuple), min_size=1, max_size=4
).map(tuple)
candidates = st.lists(st.sampled_from(WORDS), max_size=8)


def reward_of(captions_by_photo, vocabulary=VOCABULARY):
    photos = (Photo("", "", "train", captions) for captions in captions_by_photo)
    return CiderReward(CaptionDataset(photos, vocabulary, 5))


def as_ids(captions, ended=True):
    """(S, T) int64: word ids, <end> unless the captions are truncated, then <pad>."""
    ids = np.zeros((len(captions), max(map(len, captions)) + 1), np.int64)
    for row, caption in zip(ids, captions, strict=True):
        words = VOCABULARY.encode(caption)
        row[: len(words)] = words
        if ended:
            row[len(words)] = END
    return ids


def pycocoevalcap_scores(references_by_photo, captions):
    references = {
        photo: [" ".join([*caption, "<end>"]) for caption in references]
        for photo, references in enumerate(references_by_photo)
    }
    candidates = {photo: [" ".join([*caption, "<end>"])] for photo, caption in enumerate(captions)}
    return Cider().compute_score(references, candidates)[1]


@given(st.lists(st.tuples(references, candidates), min_size=1, max_size=7))
def test_each_score_equals_pycocoevalcaps(pairs):
    """Also with references of unknown words, empty captions, and photos with different numbers of references."""
    photos, captions = zip(*pairs, strict=True)
    scores = reward_of(photos)(np.arange(len(photos)), as_ids(captions))
    np.testing.assert_allclose(scores, pycocoevalcap_scores(photos, captions), rtol=1e-9, atol=1e-12)


@given(st.lists(references, min_size=1, max_size=3))
def test_every_reward_is_0_exactly_where_all_photos_have_the_same_n_grams(photos):
    reward = reward_of(photos)
    n_grams = [
        {words[i:j] for words in captions for i in range(len(words)) for j in range(i + 1, i + 5)}
        for captions in ([(*words, "<end>") for words in captions] for captions in photos)
    ]
    assert reward.is_zero == all(found == n_grams[0] for found in n_grams)


@given(st.lists(references, min_size=2, max_size=6), st.lists(candidates, min_size=1, max_size=9), st.data())
def test_captions_of_any_photos_in_any_order_score_the_same_together_as_alone(photos, captions, data):
    any_photo = st.integers(0, len(photos) - 1)
    photo_index = np.array(data.draw(st.lists(any_photo, min_size=len(captions), max_size=len(captions))))
    reward = reward_of(photos)
    together = reward(photo_index, as_ids(captions))
    alone = [reward(photo_index[i : i + 1], as_ids(captions[i : i + 1]))[0] for i in range(len(captions))]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_real_captions_score_as_in_pycocoevalcap(small_data):
    photos = list(read_captions(small_data))
    vocabulary = Vocabulary.load(small_data / "vocab.json")
    captions = [photos[(3 * i) % len(photos)].captions[0][: 4 + i % 5] for i in range(len(photos))]
    encoded = [vocabulary.encode(caption) for caption in captions]
    ids = np.zeros((len(photos), 12), np.int64)
    for row, caption in zip(ids, encoded, strict=True):
        row[: len(caption) + 1] = [*caption, END]
    words = [vocabulary.decode(caption) for caption in encoded]
    expected = pycocoevalcap_scores([photo.captions for photo in photos], words)
    assert expected.max() > 1
    scores = reward_of([photo.captions for photo in photos], vocabulary)(np.arange(len(photos)), ids)
    np.testing.assert_allclose(scores, expected, rtol=1e-9)


def test_candidates_may_have_longer_ngrams_than_any_reference():
    photos, captions = [[("a",)], [("two", "man")]], [("two", "man", "two", "man", "runs"), ("two", "man", "a")]
    scores = reward_of(photos)(np.arange(2), as_ids(captions))
    np.testing.assert_allclose(scores, pycocoevalcap_scores(photos, captions), rtol=1e-9)


def test_a_truncated_caption_scores_less_than_one_that_ends():
    photos = [[("a", "dog", "runs")], [("two", "man")], [("grass",)]]
    reward = reward_of(photos)
    complete = reward(np.array([0]), as_ids([("a", "dog", "runs")]))[0]
    truncated = reward(np.array([0]), as_ids([("a", "dog", "runs")], ended=False))[0]
    assert complete == pytest.approx(10) and truncated < 0.9 * complete
