"""The doctor for data finds planted faults, writes them to a page that works offline, and explains bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import config
from captioning.doctor import matching_model, mismatches, near_duplicates, text_checks
from captioning.doctor.checkup import check_data
from captioning.doctor.findings import Check, Finding
from captioning.doctor.matching_model import CaptionTerms, terms_of
from captioning.doctor.report import write_check_page
from captioning.errors import UserError
from captioning.runtime import command_line
from preprocess.__main__ import main
from preprocess.captions import CAPTIONS_FILE, Photo, read_captions, write_captions
from preprocess.vocabulary import SPECIAL, Vocabulary
from tests.test_bench import bench
from tests.test_html_report import ParsedPage


def photo(id, *captions, split="train"):
    return Photo(f"{id}.jpg", id, split, tuple(tuple(caption.split()) for caption in captions))


def found(findings):
    return [(finding.photos[0].id, " ".join(finding.caption)) for finding in findings]


# ---- captions alone


def test_a_text_of_several_photos_is_canned_and_long_ones_at_many_photos_come_first():
    photos = [photo(str(i), "an image of something", f"dog {i}", "a dog") for i in range(3)]
    photos += [photo("3", "a dog")]
    findings = text_checks.canned_texts(photos)
    assert [(" ".join(finding.caption), finding.note) for finding in findings] == [
        ("an image of something", "at 3 photos"),
        ("a dog", "at 4 photos"),
    ]


def test_a_text_that_a_photo_has_twice_is_repeated():
    photos = [photo("1", "a dog", "a dog", "the dog"), photo("2", "a dog", "the dog")]
    (finding,) = text_checks.repeated_texts(photos)
    assert (finding.photos[0].id, finding.note) == ("1", "2 of the photo's 3 captions")


@pytest.mark.parametrize(
    ("language", "usual", "foreign"),
    [("en", "a dog runs", ["一只 狗", "собака бежит", "un chien qui court"]), ("zh", "一只 狗 跑", ["a dog runs"])],
)
def test_captions_of_another_script_or_of_words_nobody_else_has_are_foreign(language, usual, foreign):
    photos = [photo(str(i), usual, "T恤 狗" if language == "zh" else "café dog") for i in range(5)]
    photos += [photo("other", *foreign)]
    assert sorted(found(text_checks.foreign_captions(photos, language))) == sorted(("other", text) for text in foreign)


def test_captions_that_say_left_and_right_of_one_thing_contradict_each_other():
    photos = [
        photo("slip", "a dog left of a man", "a dog right of a man"),
        photo("两", "狗 在 左边", "狗 在 右边"),
        photo("agreed", "a dog on the left", "left a dog"),
        photo("both", "a dog left and a man right", "the man on the right"),
        photo("unlike", "two cats to the left", "a man walks right of some car"),
    ]
    findings = text_checks.contradicting_sides(photos)
    assert [finding.photos[0].id for finding in findings] == ["slip", "两", "unlike"]
    assert findings[0].score == 1 > findings[2].score


def test_very_long_and_very_short_captions_are_those_far_from_the_median():
    photos = [photo(str(i), "one two three four five") for i in range(5)]
    photos += [
        photo("long", "word " * 13),
        photo("longer", "word " * 20),
        photo("short", "dog"),
        photo("fine", "a b c"),
    ]
    assert [id for id, _ in found(text_checks.long_captions(photos))] == ["longer", "long"]
    assert [id for id, _ in found(text_checks.short_captions(photos))] == ["short"]


def test_a_word_of_many_photos_that_are_all_in_one_split_is_listed_and_a_rare_word_is_not():
    photos = [photo(f"t{i}", "a dog") for i in range(40)]
    photos += [photo(f"v{i}", f"a {'zebra' if i < 5 else 'yak' if i == 5 else 'dog'}", split="val") for i in range(10)]
    (finding,) = text_checks.words_of_one_split(photos)
    assert finding.caption == ("zebra",)
    assert finding.note == "at 5 photos, all in val"
    assert finding.score == pytest.approx(-np.log10(0.2**5))


# ---- with features


THINGS = ["dog", "cat", "man", "car", "boat", "tree"]
PLACES = ["grass", "snow", "sand", "road", "water", "hill"]


def toy_data(photos=144):
    """Photos of a thing at a place, four captions each, and features that show both."""
    random = np.random.default_rng(0)
    records, features = [], []
    for i in range(photos):
        thing, place = i % 6, i // 6 % 6
        words = THINGS[thing], PLACES[place]
        captions = ["a {} on {}", "the {} at {}", "one {} and {}", "some {} near {}"]
        records.append(photo(str(i), *(caption.format(*words) for caption in captions)))
        features.append(np.r_[np.eye(6)[thing], np.eye(6)[place]] + random.uniform(0, 0.2, 12))
    return records, torch.tensor(np.array(features), dtype=torch.float32)


@pytest.fixture
def quick(monkeypatch):
    """Smaller models and less training: the toy data are easy."""
    monkeypatch.setattr(matching_model, "VECTOR_SIZE", 32)
    monkeypatch.setattr(matching_model, "EPOCHS", 1)
    monkeypatch.setattr(matching_model, "MIN_STEPS", 10)
    monkeypatch.setattr(mismatches, "MODELS", 1)
    monkeypatch.setattr(mismatches, "CLASSIFIER_STEPS", 150)


def test_swapped_captions_are_found_with_the_photos_that_they_fit(quick, monkeypatch):
    monkeypatch.setattr(matching_model, "MIN_STEPS", 100)
    photos, features = toy_data()
    swaps = {0: 7, 7: 14, 14: 0}  # both thing and place differ
    swapped = [
        replace(record, captions=(photos[swaps[i]].captions[0], *record.captions[1:])) if i in swaps else record
        for i, record in enumerate(photos)
    ]
    findings = mismatches.check_mismatches(swapped, features, "en").findings
    assert {finding.photos[0].id for finding in findings[:3]} == {"0", "7", "14"}
    for finding in findings[:3]:
        assert finding.caption == photos[swaps[int(finding.photos[0].id)]].captions[0]
        assert all(word in " ".join(finding.photos[1].captions[1]) for word in (finding.caption[1], finding.caption[3]))


def test_the_order_of_the_log_odds_is_that_of_the_captions_and_the_generator_of_torch_stays_as_it_was(quick):
    photos, features = toy_data(36)
    photos[0] = replace(photos[0], captions=photos[0].captions[:1])  # a photo without other captions
    state = torch.get_rng_state()
    captions = CaptionTerms.of(photos, "en")
    log_odds, best = mismatches.find_mismatches(captions, features)
    assert len(log_odds) == len(best) == len(captions.owner) == 1 + 35 * 4
    assert torch.isfinite(log_odds).all()
    assert (best != captions.owner).all()
    assert torch.equal(state, torch.get_rng_state())


def test_every_caption_is_judged_once_by_models_that_never_saw_its_photo(quick, monkeypatch):
    seen, judged = [], []

    def train(captions, features, photos, name):
        seen.append(set(photos.tolist()))
        return train_model(captions, features, photos, name)

    def gather(models, captions, features, photos):
        judged.extend(photos.tolist())
        assert seen[-1] == set(range(36)) - set(photos.tolist())
        return gather_evidence(models, captions, features, photos)

    train_model, gather_evidence = mismatches.train_model, mismatches.gather_evidence
    monkeypatch.setattr(mismatches, "train_model", train)
    monkeypatch.setattr(mismatches, "gather_evidence", gather)
    monkeypatch.setattr(mismatches, "CLASSIFIER_STEPS", 1)
    photos, features = toy_data(36)
    mismatches.find_mismatches(CaptionTerms.of(photos, "en"), features)
    assert sorted(judged) == list(range(36))


def test_a_caption_is_compared_with_the_words_of_the_photos_most_like_its_own():
    photos, features = toy_data(36)
    photos[7] = replace(photos[7], captions=photos[7].captions[:2])
    captions = CaptionTerms.of(photos, "en")
    torch.manual_seed(0)
    model = matching_model.MatchingModel(len(captions.weights), features.shape[1])
    with torch.inference_mode():
        measure = mismatches._Measure([model], captions, features)
        rows, places = torch.arange(len(captions.owner)), (torch.arange(len(captions.owner)) + 50) % len(captions.owner)
        expected, known = measure._compare_with_neighbours(rows, places)
    texts = [[*dict.fromkeys(terms_of(words, "en"))] for photo in photos for words in photo.captions]
    for row in (0, 30, 90):
        place = int(places[row])
        own = {int(captions.owner[row]), int(captions.owner[place])}
        fit = measure.full @ measure.without[place]
        alike = sorted(set(range(36)) - own, key=lambda photo: -fit[photo])[: mismatches.NEIGHBOURS]
        near = [text for text, owner in zip(texts, captions.owner.tolist(), strict=True) if owner in alike]
        terms = [term for term in texts[row] if sum(term in text for text in texts) >= matching_model.MIN_COUNT]
        prior = mismatches.PRIOR_CAPTIONS
        found = [sum(term in text for text in near) for term in terms]
        usual = [sum(term in text for text in texts) / len(texts) for term in terms]
        ratios = [(n + prior * f) / (len(near) + prior) / f for n, f in zip(found, usual, strict=True)]
        assert float(expected[row]) == pytest.approx(np.log(ratios).sum(), abs=1e-4)
        assert known[row, : len(terms)].tolist() == [n > 0 for n in found]


def test_the_bench_takes_out_the_captions_that_a_file_lists_and_names_one_that_is_not_there(tmp_path):
    doctor = bench("doctor")
    vocabulary = Vocabulary("zh", "jieba", 1, SPECIAL)
    photos = [photo("1", "一只 狗", "两只 猫"), photo("2", "一只 狗")]
    listed = tmp_path / "wrong.tsv"
    dog, cat = map(doctor.digest, ("一只狗", "一只猫"))
    listed.write_text(f"1\t{dog}\n2\t{dog}\n", "utf-8")
    wrong = doctor.read_wrong(listed, photos, vocabulary)
    kept = doctor.leave_out(photos, wrong)
    assert [photo.captions for photo in kept] == [(("两只", "猫"),), (("一只", "狗"),)]  # a photo keeps one
    listed.write_text(f"1\t{cat}\n", "utf-8")
    with pytest.raises(SystemExit, match=f"no caption.*{cat}"):
        doctor.read_wrong(listed, photos, vocabulary)


def test_terms_are_words_with_chinese_characters_or_english_pairs():
    assert list(terms_of(("小狗", "跑"), "zh")) == ["小狗", "跑", "小", "狗"]
    assert list(terms_of(("a", "black", "dog"), "en")) == ["a", "black", "dog", "a black", "black dog"]


def noise_photo(path, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((200, 150), Image.Resampling.BICUBIC).save(path)


def test_a_photo_saved_anew_in_another_split_is_a_near_duplicate_and_a_photo_with_near_features_is_not(
    tmp_path, capsys
):
    for seed in range(4):
        noise_photo(tmp_path / f"{seed}.png", seed)
    Image.open(tmp_path / "0.png").resize((160, 120)).save(tmp_path / "copy.jpg", quality=40)
    names = ["0.png", "1.png", "2.png", "3.png", "copy.jpg", "missing.jpg"]
    photos = [Photo(str(tmp_path / name), name, "train", (("a",),)) for name in names]
    photos[4] = replace(photos[4], split="val")
    random = np.random.default_rng(0)
    features = random.uniform(0, 1, (6, 32))
    features[[1, 4, 5]] = features[0] + random.normal(0, 0.01, (3, 32))  # near, whatever they show
    (finding,) = near_duplicates.check_near_duplicates(photos, torch.tensor(features, dtype=torch.float32)).findings
    assert [photo.id for photo in finding.photos] == ["0.png", "copy.jpg"]
    assert finding.score > 1.9
    assert "1 of 6 photos cannot be read, such as" in capsys.readouterr().out


# ---- the command


def test_without_features_only_captions_are_checked_and_one_line_says_so(small_data, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in (CAPTIONS_FILE, "vocab.json"):
        (data / name).write_bytes((small_data / name).read_bytes())
    before = {file.name: file.read_bytes() for file in data.iterdir()}
    main(config.Preprocess(data, check=True))
    assert "--features features.h5 adds" in capsys.readouterr().out
    results = json.loads((data / "check.json").read_text("utf-8"))
    assert "mismatches" not in results
    assert results["canned_texts"]["found"] == len(results["canned_texts"]["findings"]) > 0
    page = ParsedPage((data / "check.html").read_text("utf-8"))
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe"}
    after = {file.name: file.read_bytes() for file in data.iterdir() if not file.name.startswith("check.")}
    assert after == before


def test_the_page_shows_captions_as_they_are_written_with_the_spaces_of_those_cut_by_hand(tmp_path):
    finding = Finding(1.0, "", (photo("none", "一只 狗", "两只 狗"),), ("一只", "狗"))
    for tokenizer, shown in (("jieba", ["一只狗", "两只狗"]), ("whitespace", ["一只 狗", "两只 狗"])):
        vocabulary = Vocabulary("zh", tokenizer, 1, SPECIAL)
        write_check_page(tmp_path / "check.html", "", vocabulary, [Check("name", "", "", [finding])])
        page = (tmp_path / "check.html").read_text("utf-8")
        assert all(f">{text}<" in page for text in shown)
        assert "other captions of the photo:" in page and "(train)</figcaption>" in page


def test_with_features_photos_are_checked_too(here, quick, monkeypatch, tmp_path):
    data = here / "data" / "small"
    copy = tmp_path / "data"
    copy.mkdir()
    for name in (CAPTIONS_FILE, "vocab.json"):
        (copy / name).write_bytes((data / name).read_bytes())
    monkeypatch.setattr("captioning.doctor.checkup.MIN_PHOTOS", 10)
    monkeypatch.setattr(matching_model, "MIN_STEPS", 1)
    check_data(copy, data / "features.h5", 0.01)
    results = json.loads((copy / "check.json").read_text("utf-8"))
    assert list(results)[:2] == ["mismatches", "near_duplicates"]
    assert results["near_duplicates"]["found"] > 0  # squares of the same colours at about the same place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda photos: [replace(photo, id=f"other {photo.id}") for photo in photos],
            "belongs to another data set: .*--overwrite",
        ),
        (lambda photos: [*photos, replace(photos[0], id="new")], "no features for 1 of 25 photos; run: python extract"),
        (lambda photos: photos, "fewer than 100 photos"),
    ],
)
def test_features_that_do_not_fit_are_one_line(here, tmp_path, change, message):
    data = here / "data" / "small"
    copy = tmp_path / "data"
    copy.mkdir()
    (copy / "vocab.json").write_bytes((data / "vocab.json").read_bytes())
    write_captions(copy / CAPTIONS_FILE, change(list(read_captions(data))))
    with pytest.raises(UserError, match=message):
        check_data(copy, data / "features.h5", 0.01)
    assert not (copy / "check.html").exists()


def test_features_that_do_not_exist_are_one_line(here):
    with pytest.raises(UserError, match=r"none\.h5"):
        check_data(here / "data" / "small", here / "none.h5", 0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--check", "--scenes", "20"], "leave out --scenes"),
        (["--check", "--overwrite"], "leave out --overwrite"),
        (["--scenes", "20", "--features", "features.h5"], "--features requires --check"),
    ],
)
def test_flags_that_do_not_belong_to_the_check_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        command_line.parse(config.Preprocess, ["data/x", *flags])
