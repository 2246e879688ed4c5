"""The table of scores: protocols, facts and comparisons, on captions of known worth and on real ones."""

import json
import shutil

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captioning.caption import CaptionResult
from captioning.evaluation.metrics import aggregate, score
from captioning.evaluation.results import read_captioned, read_photos
from captioning.evaluation.score_report import (
    CaptionStats,
    by_challenge,
    by_character,
    compare,
    format_comparison,
    score_captions,
)
from preprocess.annotations import read_annotations
from preprocess.captions import Photo
from preprocess.tokenizers import jieba_cut, tokenize


def pair(id, words, *references, joint="", **more):
    return Photo(f"{id}.jpg", id, "val", references), CaptionResult(joint.join(words), list(words), **more)


CHINESE = pair("1", ["两只", "狗", "在", "奔跑"], ("两只", "小狗", "在", "奔跑"))
ENGLISH = [
    pair("1", "a man on a".split(), ("a", "dog"), ("a", "dog", "and"), joint=" ", finished=False),
    pair("2", "a dog on the grass".split(), ("a", "dog"), ("a", "dog", "and"), joint=" ", finished=True),
    pair("3", [], ("a", "dog"), ("a", "dog", "and"), joint=" ", finished=True),
    pair("4", "dogs with".split(), ("a", "dog"), ("a", "dog", "and"), joint=" ", finished=True),
]


def test_chinese_is_scored_by_word_by_character_and_as_the_challenge_does():
    scores = score_captions([CHINESE], "zh", "jieba")
    table = scores.to_dict()
    assert table["character"]["BLEU-1"] > table["word"]["BLEU-1"] > 0 and "ai-challenger" in table
    assert "by character" in str(scores) and "jieba" in str(scores) and "skipped: SPICE is for English" in str(scores)
    assert "ai-challenger" not in score_captions([CHINESE], "zh", "character", java=False).parts


def test_captions_are_described_beside_their_references():
    scores = score_captions(ENGLISH, "en", "whitespace", java=False)
    assert scores.captions == CaptionStats(11 / 4, 8, 1.0, 1 / 11, 0.5, 0.25)
    assert scores.references == CaptionStats(2.5, 3, 0.25, 0.0, 0.5, None)
    assert (
        "50.0%" in str(scores) and json.loads(json.dumps(scores.to_dict()))["facts"]["captions"]["unfinished"] == 0.25
    )


def test_the_score_of_each_caption_is_that_of_the_caption_alone_but_for_ciders_document_frequencies():
    each = score_captions(ENGLISH, "en", "whitespace", java=False).per_caption
    for row, (photo, caption) in zip(each, ENGLISH, strict=True):
        alone = score({photo.id: caption.words}, {photo.id: photo.captions})
        np.testing.assert_allclose(row[:5], list(alone.values())[:5], atol=1e-6)


@pytest.mark.parametrize(
    "file, language, tokenizer, most",
    [("dataset_flickr8k.json", "en", "whitespace", 0.007), ("caption_val_annotations_zh.json", "zh", "jieba", 0.0012)],
)
def test_people_hardly_ever_end_a_caption_in_a_function_word(shared, file, language, tokenizer, most):
    flickr = shared / "flickr8k"
    records = read_annotations(flickr / file, flickr / "images", "val" if language == "zh" else None)[-1000:]
    captions = [tokenize(caption, tokenizer) for record in records for caption in record.captions]
    assert 0 < CaptionStats.of(captions, language).function_word_endings < most


def test_characters_do_not_depend_on_how_the_words_were_cut_and_latin_runs_stay_whole():
    expected = ["穿", "NBA", "球", "衣", "的", "23", "人"]
    assert by_character(["穿", "NBA", "球衣", "的", "23", "人"]) == expected
    assert by_character(["穿", "NBA球", "衣的", "2", "3人"]) == expected


# ---- AI Challenger's own evaluation


@pytest.mark.skipif(not shutil.which("java"), reason="the PTB tokenizer needs Java")
def test_in_chinese_the_ptb_tokenizer_only_drops_marks_and_lowers_the_case(shared):
    captions = json.loads((shared / "flickr8k/caption_val_annotations_zh.json").read_text("utf-8"))
    cut = [jieba_cut(text) for entry in captions for text in entry["caption"]]
    cut += [["“", "你好", "”", "!"], ["穿", "T恤", "的", "3", "个", "人", ",", "-", "NBA", "."]]
    theirs = PTBTokenizer().tokenize({i: [{"caption": " ".join(words)}] for i, words in enumerate(cut)})
    assert [" ".join(by_challenge(words)) for words in cut] == [theirs[i][0] for i in range(len(cut))]


def test_the_challenge_drops_full_stops_before_it_cuts_and_cuts_the_text_anew():
    photo, caption = CHINESE
    parts = [
        score_captions([(photo, CaptionResult(text, words))], "zh", "jieba", java=False).parts["ai-challenger"]
        for text, words in (
            (caption.text, caption.words),
            ("".join(caption.words[:2]) + "。在奔跑。", ["两只狗在奔跑"]),
        )
    ]
    assert np.array_equal(*parts) and parts[0][0, 0] == 3, "两只, 在, 奔跑"


def test_the_challenges_own_sample_scores_as_its_procedure_written_out(shared):
    folder = shared / "ai_challenger"
    photos, language, tokenizer = read_photos(folder / "id_to_words.json", "val", None)
    assert (len(photos), language, tokenizer) == (3, "zh", "jieba")
    pairs = read_captioned(folder / "id_to_test_caption.json", photos, tokenizer)
    found = aggregate(score_captions(pairs, language, tokenizer, java=False).parts["ai-challenger"])

    references, names = {}, {}
    sample = json.loads((folder / "id_to_words.json").read_text("utf-8"))
    for image in sample["images"]:
        names[image["file_name"]] = image["id"]
    for annotation in sample["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    submission = json.loads((folder / "id_to_test_caption.json").read_text("utf-8"))
    candidates = {
        names[line["image_id"]]: [" ".join(jieba_cut(line["caption"].strip().replace("。", "")))] for line in submission
    }
    references = {id: references[id] for id in candidates}  # no marks in either: nothing for the PTB tokenizer to do
    rouge, cider = (scorer.compute_score(references, candidates)[0] for scorer in (Rouge(), Cider()))
    expected = [*Bleu(4).compute_score(references, candidates, verbose=0)[0], rouge, cider]
    np.testing.assert_allclose(found, 100 * np.array(expected), atol=1e-6)


# ---- comparisons


def noisy(share, seed, photos=60):
    """Captions of which a share is wrong."""
    random = np.random.default_rng(seed)
    right = [[*"abcde", str(i)] for i in range(photos)]
    captions = [words if random.random() > share else ["x", *words[:2]] for words in right]
    return [pair(str(i), words, tuple(right[i]), joint=" ") for i, words in enumerate(captions)]


def test_a_set_of_captions_compared_with_itself_is_no_better():
    scores = score_captions(noisy(0.3, 0), "en", "whitespace", java=False)
    for figures in compare(scores, scores)["word"].values():
        assert figures == {"difference": 0.0, "interval": [0.0, 0.0], "better": 0.0}


def test_better_captions_are_found_better_and_the_resamples_are_paired():
    worse, better = (score_captions(noisy(share, 1), "en", "whitespace", java=False) for share in (0.5, 0.3))
    found = compare(worse, better)["word"]["CIDEr-D"]
    low, high = found["interval"]
    assert 0 < low < found["difference"] < high and found["better"] > 0.99
    gaps = 100 * (better.parts["word"][:, 11] - worse.parts["word"][:, 11])
    assert high - low == pytest.approx(2 * 1.96 * gaps.std() / np.sqrt(60), rel=0.12)
    assert compare(better, worse)["word"]["CIDEr-D"]["better"] < 0.01
    assert f"{found['difference']:+.1f}" in format_comparison(compare(worse, better))
