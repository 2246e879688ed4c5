"""Score reports: protocols, caption statistics and comparisons, on captions of known quality and on real ones."""

import json
import re
import shutil

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from captioning.caption import CaptionResult
from captioning.evaluation import java_metrics, score_report
from captioning.evaluation.coco_tokens import coco_tokens
from captioning.evaluation.metrics import aggregate, score
from captioning.evaluation.results import read_reference_photos, read_results
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


def captioned(id, words, *references, separator="", **fields):
    """A photo with its references, and its caption."""
    return Photo(f"{id}.jpg", id, "val", references), CaptionResult(separator.join(words), list(words), **fields)


CHINESE = captioned("1", ["两只", "狗", "在", "奔跑"], ("两只", "小狗", "在", "奔跑"))
ENGLISH = [
    captioned("1", "a man on a".split(), ("a", "dog"), ("a", "dog", "and"), separator=" ", finished=False),
    captioned("2", "a dog on the grass".split(), ("a", "dog"), ("a", "dog", "and"), separator=" ", finished=True),
    captioned("3", [], ("a", "dog"), ("a", "dog", "and"), separator=" ", finished=True),
    captioned("4", "dogs with".split(), ("a", "dog"), ("a", "dog", "and"), separator=" ", finished=True),
]


def test_chinese_is_scored_by_word_by_character_and_by_the_challenges_protocol(monkeypatch, times):
    """METEOR takes seconds to start, so it runs only under --torture."""
    meteor = times(lambda candidates, references: 50.0, java_metrics.meteor_score)
    monkeypatch.setattr(score_report, "meteor_score", meteor)
    scores = score_captions([CHINESE], "zh", "jieba")
    table = scores.to_dict()
    assert table["word"]["METEOR"] == "skipped: METEOR is for English"
    if times(True, False) or shutil.which("java"):
        assert table["ai-challenger"]["METEOR"] > 0
    assert table["character"]["BLEU-1"] > table["word"]["BLEU-1"] > 0 and "ai-challenger" in table
    assert "by character" in str(scores) and "jieba" in str(scores) and "skipped: SPICE is for English" in str(scores)
    assert "ai-challenger" not in score_captions([CHINESE], "zh", "character", java=False).stats


def test_statistics_of_captions_and_references_are_reported():
    scores = score_captions(ENGLISH, "en", "whitespace", java=False)
    assert scores.caption_stats == CaptionStats(11 / 4, 8, 1.0, 1 / 11, 0.5, 0.25)
    assert scores.reference_stats == CaptionStats(2.5, 3, 0.25, 0.0, 0.5, None)
    assert (
        "50.0%" in str(scores) and json.loads(json.dumps(scores.to_dict()))["facts"]["captions"]["unfinished"] == 0.25
    )


def test_a_score_of_one_photo_is_reported_with_the_reason_why_it_says_nothing():
    pairs = [(Photo("", "1", "val", (("a", "dog"),)), CaptionResult("a dog", ["a", "dog"]))]
    scores = score_captions(pairs, "en", "whitespace", java=False)
    assert "CIDEr-D by word says nothing about the captions: it weighs words" in str(scores)
    assert scores.to_dict()["uninformative"]["word"]["BLEU-4"] == "no reference has four words"


def test_per_caption_scores_equal_those_of_the_caption_alone_except_cider():
    per_caption = score_captions(ENGLISH, "en", "whitespace", java=False).per_caption
    for row, (photo, caption) in zip(per_caption, ENGLISH, strict=True):  # CIDEr-D depends on document frequencies
        alone = score({photo.id: caption.words}, {photo.id: photo.captions})
        np.testing.assert_allclose(row[:5], list(alone.values())[:5], atol=1e-6)


@pytest.mark.parametrize(
    "file, language, tokenizer, maximum",
    [("dataset_flickr8k.json", "en", "whitespace", 0.007), ("caption_val_annotations_zh.json", "zh", "jieba", 0.0012)],
)
def test_references_rarely_end_in_a_function_word(shared, file, language, tokenizer, maximum):
    flickr = shared / "flickr8k"
    records = read_annotations(flickr / file, flickr / "images", "val" if language == "zh" else None).records[-1000:]
    captions = [tokenize(caption, tokenizer) for record in records for caption in record.captions]
    assert 0 < CaptionStats.compute(captions, language).function_word_endings < maximum


def test_characters_do_not_depend_on_the_tokenizer_and_latin_runs_stay_together():
    expected = ["穿", "NBA", "球", "衣", "的", "23", "人"]
    assert by_character(["穿", "NBA", "球衣", "的", "23", "人"]) == expected
    assert by_character(["穿", "NBA球", "衣的", "2", "3人"]) == expected


# ---- AI Challenger's own evaluation


@pytest.mark.skipif(not shutil.which("java"), reason="the PTB tokenizer needs Java")
def test_in_chinese_the_ptb_tokenizer_only_drops_punctuation_and_lowers_the_case(shared):
    captions = json.loads((shared / "flickr8k/caption_val_annotations_zh.json").read_text("utf-8"))
    tokenized = [jieba_cut(text) for entry in captions for text in entry["caption"]]
    tokenized += [["“", "你好", "”", "!"], ["穿", "T恤", "的", "3", "个", "人", ",", "-", "NBA", "."]]
    texts = {i: [{"caption": " ".join(words)}] for i, words in enumerate(tokenized)}
    expected = PTBTokenizer().tokenize(texts)
    assert [" ".join(by_challenge(words)) for words in tokenized] == [expected[i][0] for i in range(len(tokenized))]


def test_the_challenge_drops_full_stops_and_tokenizes_the_text_again():
    photo, caption = CHINESE
    stats = [
        score_captions([(photo, CaptionResult(text, words))], "zh", "jieba", java=False).stats["ai-challenger"]
        for text, words in (
            (caption.text, caption.words),
            ("".join(caption.words[:2]) + "。在奔跑。", ["两只狗在奔跑"]),
        )
    ]
    assert np.array_equal(*stats) and stats[0][0, 0] == 3, "两只, 在, 奔跑"


def test_the_challenges_sample_scores_like_its_evaluation_written_out(shared):
    folder = shared / "ai_challenger"
    read = read_reference_photos(folder / "id_to_words.json", "val")
    assert (len(read.photos), read.language, read.tokenizer, read.cut_by_hand) == (3, "zh", "jieba", True)
    captions = read_results(folder / "id_to_test_caption.json", read)
    found = aggregate(score_captions(captions, read.language, read.tokenizer, java=False).stats["ai-challenger"])

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
    references = {id: references[id] for id in candidates}  # neither has punctuation for the PTB tokenizer
    rouge, cider = (scorer.compute_score(references, candidates)[0] for scorer in (Rouge(), Cider()))
    expected = [*Bleu(4).compute_score(references, candidates, verbose=0)[0], rouge, cider]
    np.testing.assert_allclose(found, 100 * np.array(expected), atol=1e-6)


# ---- coco-caption's own tokens


@pytest.mark.parametrize(
    "caption, tokens",
    [
        ("A man's T-shirt (red), and the dogs' toys.", "a man 's t-shirt -lrb- red -rrb- and the dogs toys"),
        ("It isn't, can't; cannot -- they'll gonna go!", "it is n't ca n't can not they 'll gon na go"),
        ("Mr. Smith of St. Louis, in the U.S. at 5 p.m.", "mr. smith of st. louis in the u.s. at 5 p.m."),
        ('A "STOP" sign: 5:30pm, 1,000 dogs; $5, 50%!!', "a stop sign 5:30 pm 1,000 dogs $ 5 50 % !!"),
        ("plan B. It is O'Brien’s #41 at AT&T and/or h&m", "plan b it is o'brien 's # 41 at at&t and/or h & m"),
        ("<unk> dog... grass.A cat – 22 3/4", "<unk> dog grass.a cat 22 3/4"),
        ("... !", ""),
    ],
)
def test_coco_tokens_are_those_of_the_penn_treebank_without_punctuation(caption, tokens):
    assert coco_tokens(caption) == tokens.split()


@pytest.mark.skipif(not shutil.which("java"), reason="the PTB tokenizer needs Java")
def test_coco_tokens_equal_the_java_tokenizer_on_flickr8k_and_coco(shared, times):
    """In the suite on those of COCO with more than letters; under --torture on all, 60,007 different ones.

    Between them is a word: see captioning/evaluation/coco_tokens.py.
    """
    texts = set()
    for file in (shared / "coco_mini/annotations").glob("*.json"):
        texts |= {annotation["caption"] for annotation in json.loads(file.read_text("utf-8"))["annotations"]}
    if times(False, True):
        images = json.loads((shared / "flickr8k/dataset_flickr8k.json").read_text("utf-8"))["images"]
        texts |= {sentence["raw"] for image in images for sentence in image["sentences"]}
    texts = sorted(text for text in texts if times(re.search(r"[^a-zA-Z\s.,-]", text), True))
    assert len(texts) > times(400, 60_000)
    java = PTBTokenizer().tokenize({i: [{"caption": text}, {"caption": "x"}] for i, text in enumerate(texts)})
    assert [coco_tokens(text) for text in texts] == [java[i][0].split() for i in range(len(texts))]


def test_english_is_also_scored_by_coco_tokens_if_its_texts_are_known():
    photo, caption = captioned("1", "a mans dog".split(), ("a", "mans", "dog"), separator=" ")
    scores = score_captions([(photo, caption)], "en", "whitespace", java=False, texts={"1": ["A man's dog.", "..."]})
    assert list(scores.stats) == ["word", "coco"] and "by coco" in str(scores)
    assert scores.stats["coco"][0, 0] == 2, "a and dog: mans is not man 's"
    without = score_captions([(photo, caption)], "en", "whitespace", java=False)
    assert list(without.stats) == ["word"] and "run python -m preprocess again" in str(without)


def test_languages_without_a_list_of_function_words_have_no_fraction_of_bad_endings():
    scores = score_captions([captioned("1", ["赤い", "車"], ("赤い", "車"))], "ja", "fugashi", java=False)
    assert scores.caption_stats.function_word_endings is None and list(scores.stats) == ["word", "character"]
    assert "-" in str(scores).splitlines()[-1]


# ---- comparisons


def noisy_captions(fraction, seed, num_photos=60):
    """Captions of which a fraction is wrong."""
    rng = np.random.default_rng(seed)
    references = [[*"abcde", str(i)] for i in range(num_photos)]
    captions = [words if rng.random() > fraction else ["x", *words[:2]] for words in references]
    return [captioned(str(i), words, tuple(references[i]), separator=" ") for i, words in enumerate(captions)]


def test_a_set_of_captions_compared_with_itself_is_no_better():
    scores = score_captions(noisy_captions(0.3, 0), "en", "whitespace", java=False)
    for metric in compare(scores, scores)["word"].values():
        assert metric == {"difference": 0.0, "interval": [0.0, 0.0], "better": 0.0}


def test_better_captions_win_the_comparison_and_its_resamples_are_paired():
    worse, better = (
        score_captions(noisy_captions(fraction, 1), "en", "whitespace", java=False) for fraction in (0.5, 0.3)
    )
    found = compare(worse, better)["word"]["CIDEr-D"]
    low, high = found["interval"]
    assert 0 < low < found["difference"] < high and found["better"] > 0.99
    gaps = 100 * (better.stats["word"][:, 11] - worse.stats["word"][:, 11])
    assert high - low == pytest.approx(2 * 1.96 * gaps.std() / np.sqrt(60), rel=0.12)
    assert compare(better, worse)["word"]["CIDEr-D"]["better"] < 0.01
    assert f"{found['difference']:+.1f}" in format_comparison(compare(worse, better))
