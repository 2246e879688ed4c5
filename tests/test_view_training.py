"""Training on several cached views: drawn anew in every epoch, evenly, never mirrored where a caption tells sides."""

import csv
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import extract_features
import generate
import train
from captioning.dataset.batches import CachedPhotos, draw_views
from captioning.encoders.loading import encoder_file
from captioning.errors import UserError
from captioning.features import feature_placement
from captioning.features.feature_files import open_feature_files
from captioning.features.feature_placement import FeaturePlacement
from captioning.features.feature_reader import FeatureReader
from captioning.features.feature_writer import mark_not_done
from captioning.runtime.checkpoint import load_checkpoint, save_checkpoint
from config import ExtractFeatures, Generate, Train
from preprocess.captions import CAPTIONS_FILE, Photo, read_captions, write_captions
from preprocess.vocabulary import VOCABULARY_FILE, Vocabulary
from tests.small import ENCODER, QUICK, log_of, make_small_data, same, weights

DATA = Path("data/small")
VIEWS = ["features.h5", "features.crop1.h5", "features.flip.h5", "features.flip+crop2.h5"]  # in the order of columns
SIDES = {0: ("a", "square", "on", "the", "left"), 3: ("左边", "a", "square"), 7: ("rightmost", "square")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data/small in four views. The captions of three photos tell left from right."""
    folder = tmp_path_factory.mktemp("views")
    data = make_small_data(folder)
    photos = [
        Photo(photo.image, photo.id, photo.split, (*photo.captions, *((SIDES[i],) if i in SIDES else ())))
        for i, photo in enumerate(read_captions(data))
    ]
    write_captions(data / CAPTIONS_FILE, photos)
    captions = [caption for photo in photos for caption in photo.captions]
    Vocabulary.build(captions, language="en", tokenizer="whitespace", min_count=1, max_words=100).save(
        data / VOCABULARY_FILE
    )
    extract_features.main(ExtractFeatures(data, **ENCODER, grid="native", views=4))
    return folder


@pytest.fixture
def four(made, monkeypatch):
    """The folder as the current one. Tests must not change data/small."""
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def changed(made, tmp_path, monkeypatch):
    """A copy of data/small, which a test may change, in the current folder."""
    shutil.copytree(made / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return DATA


def settings(run, **changes):
    return Train(DATA, run, **{"precision": "float32", "epochs": 3, "decoder": "attention", **QUICK, **changes})


def trainer_of(**changes):
    return train.make_trainer(settings("none", **changes))


# ---- drawing


@pytest.mark.parametrize("views", [1, 2, 3, 4])
def test_each_photo_is_seen_equally_often_in_each_of_its_views(views):
    allowed = np.ones((50, views), bool)
    for start in (0, 3 * views):
        drawn = np.stack([draw_views(allowed, 5, epoch) for epoch in range(start, start + views)])
        assert np.array_equal(np.sort(drawn, 0), np.repeat(np.arange(views)[:, None], 50, 1))


def test_an_epoch_mixes_the_views_and_the_next_ones_mix_them_otherwise():
    allowed = np.ones((4000, 4), bool)
    first, later = draw_views(allowed, 1, 0), draw_views(allowed, 1, 4)
    assert all(900 < count < 1100 for count in np.bincount(first))
    assert 0.2 < (first == later).mean() < 0.3
    assert 0.2 < (first == draw_views(allowed, 2, 0)).mean() < 0.3, "another seed"


def test_a_draw_follows_from_seed_and_epoch_and_takes_allowed_views_only():
    allowed = np.random.default_rng(0).random((300, 4)) < 0.5
    allowed[:, 2] |= ~allowed.any(1)
    for epoch in range(9):
        drawn = draw_views(allowed, 3, epoch)
        assert allowed[np.arange(300), drawn].all()
        assert np.array_equal(drawn, draw_views(allowed.copy(), 3, epoch))
    seen = np.stack([draw_views(allowed, 3, epoch) for epoch in range(12)])
    for photo in range(300):
        counts = Counter(seen[:, photo].tolist())
        assert set(counts.values()) == {12 // allowed[photo].sum()}, "evenly also where some are not allowed"


# ---- training


@pytest.mark.parametrize(
    "placement",
    [{"features_on": "disk"}, {"features_on": "ram"}, {"features_on": "ram", "decoder": "lstm"}, {"partly": True}],
)
def test_a_batch_holds_the_drawn_view_of_each_photo(four, monkeypatch, placement):
    if placement.pop("partly", False):  # the CPU takes the place of the GPU
        monkeypatch.setattr(
            feature_placement, "choose_placement", lambda _, sizes, device: FeaturePlacement(sizes.photos, 30, 20, "")
        )
    photos = trainer_of(**placement).train
    readers = [FeatureReader(DATA / name) for name in VIEWS]
    pooled = "decoder" in placement
    indices = np.array([4, 0, 11, 17])
    for epoch in (0, 1, 2, 5):
        photos.start_epoch(epoch)
        cells = photos[indices].photos.to(torch.device("cpu"), torch.float32).cells
        drawn = draw_views(photos.rows >= 0, 0, epoch)
        for cell, index in zip(cells, indices, strict=True):
            reader = readers[drawn[index]]
            row = reader.rows_of([photos.split.ids[index]])
            assert torch.equal(cell, reader.read_rows(row, pooled).cells[0].float())


def test_quantised_views_are_those_of_the_files_within_rounding(four):
    quantized, exact = (trainer_of(quantize_features=value).train for value in (True, False))
    one, other = (
        photos[np.arange(20)].photos.to(torch.device("cpu"), torch.float32).cells for photos in (quantized, exact)
    )
    assert 0 < (one - other).norm() < 0.01 * other.norm()


def test_photos_whose_captions_tell_left_from_right_are_never_mirrored(four, capsys):
    photos = trainer_of().train
    ids = [photo.id for i, photo in enumerate(read_captions(DATA)) if i in SIDES]
    assert "every photo in one of the views whole, crop:1, flip, flip+crop:2; 3 of 20 are never mirrored" in (
        capsys.readouterr().out
    )
    for index, photo in enumerate(photos.split.ids):
        assert (photos.rows[index] >= 0).tolist() == [True, True, photo not in ids, photo not in ids]
    for epoch in range(8):
        photos.start_epoch(epoch)
        views = photos.drawn_rows // 24
        assert all(views[list(photos.split.ids).index(photo)] < 2 for photo in ids)
    assert set(views.tolist()) == {0, 1, 2, 3}


def test_the_memory_holds_every_view_that_may_be_drawn_and_nothing_else(four, monkeypatch):
    placed = []
    place = feature_placement.PlacedFeatures.__init__
    monkeypatch.setattr(
        feature_placement.PlacedFeatures,
        "__init__",
        lambda self, source, rows, *others: placed.append(rows) or place(self, source, rows, *others),
    )
    trainer_of(features_on="ram")
    assert len(placed[0]) == len(set(placed[0].tolist())) == 4 * 20 - 2 * len(SIDES) + 4


def test_the_trainer_draws_by_the_epoch_of_its_progress(four):
    """Also in the middle of an epoch, from which a run may resume."""
    trainer = trainer_of(seed=7)
    photos = trainer.train
    for epoch in (0, 1, 5):
        trainer.state.progress.epoch, trainer.state.progress.step = epoch, 2
        trainer.start_epoch()
        drawn = draw_views(photos.rows >= 0, 7, epoch)
        assert np.array_equal(photos.drawn_rows, photos.rows[np.arange(20), drawn])


def test_validation_sees_the_whole_photos(four):
    trainer = trainer_of()
    reader = FeatureReader(DATA / "features.h5")
    for epoch in range(3):
        trainer.state.progress.epoch = epoch
        trainer.start_epoch()
        cells = trainer.val[np.arange(4)].photos.to(torch.device("cpu"), torch.float32).cells
        assert torch.equal(cells, reader.read(reader.rows_of(trainer.val.split.ids)).cells.float())


@pytest.mark.parametrize("changes", [{}, {"decoder": "lstm", "features_on": "ram"}, {"decoder": "hard-attention"}])
def test_a_resumed_run_on_views_equals_an_uninterrupted_one_to_the_bit(four, changes):
    name = changes.get("decoder", "attention")
    train.main(settings(name, **changes))
    train.main(settings(f"{name} resumed", **{**changes, "epochs": 1}))
    train.main(settings(f"{name} resumed", **changes, resume=True))
    assert same(weights(name), weights(f"{name} resumed"))
    train.main(settings(f"{name} whole", **changes, features=(DATA / "features.h5",)))
    assert not same(weights(name), weights(f"{name} whole"))
    assert log_of(name, "start")[0]["views"] == ["whole", "crop:1", "flip", "flip+crop:2"]


def test_cider_optimisation_reads_the_views_and_resumes_to_the_bit(four):
    train.main(settings("start", epochs=1))
    changes = {"objective": "cider", "start_from": Path("checkpoints/start"), "samples": 2, "epochs": 2}
    train.main(settings("cider", **changes))
    train.main(settings("cider resumed", **{**changes, "epochs": 1}))
    train.main(settings("cider resumed", **changes, resume=True))
    assert same(weights("cider"), weights("cider resumed"))


def test_the_order_in_which_files_are_given_changes_nothing(four):
    paths = [DATA / name for name in VIEWS]
    train.main(settings("in order", epochs=1, features=tuple(paths)))
    train.main(settings("reversed", epochs=1, features=tuple(reversed(paths))))
    assert same(weights("in order"), weights("reversed"))


def test_a_run_on_one_view_resumes_on_it_also_when_there_are_more_by_then(changed):
    for name in VIEWS[1:]:
        (DATA / name).rename(DATA / f"{name}.later")
    train.main(settings("one", epochs=2))
    train.main(settings("one resumed", epochs=1))
    saved = load_checkpoint(Path("checkpoints/one resumed/last.pt"))
    del saved["views"], saved["format"]  # a run of before
    save_checkpoint(Path("checkpoints/one resumed/last.pt"), saved)
    for name in VIEWS[1:]:
        (DATA / f"{name}.later").rename(DATA / name)
    train.main(settings("one resumed", epochs=2, resume=True))
    assert same(weights("one"), weights("one resumed"))
    given = tuple(DATA / name for name in VIEWS[:2])
    with pytest.raises(
        UserError, match="checkpoints/one: was trained on the views whole of the photos, not whole, crop:1"
    ):
        train.main(settings("one", epochs=3, resume=True, features=given))


def test_captions_of_a_split_are_those_of_the_whole_photos(four, capsys):
    train.main(settings("captions", epochs=1, features=(DATA / "features.h5",)))
    texts = []
    for features in ((), (DATA / "features.h5",), tuple(DATA / name for name in reversed(VIEWS))):
        capsys.readouterr()
        generate.main(
            Generate(Path("checkpoints/captions"), data=DATA, features=features, precision="float32", device="cpu")
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def log_probabilities(path):
    """Photo -> caption and its log-probability, from a table of generate.py."""
    with open(path, encoding="utf-8-sig") as file:
        return {row["photo"]: (row["caption"], float(row["log_probability"])) for row in csv.DictReader(file)}


@pytest.mark.parametrize("decoder", ["attention", "lstm"])
def test_captions_of_views_are_the_same_from_the_cache_and_from_the_photos(changed, decoder):
    extract_features.main(ExtractFeatures(DATA, **ENCODER, grid="native", views=4, dtype="float32", overwrite=True))
    train.main(settings("run", epochs=2, decoder=decoder))
    common = {"data": DATA, "precision": "float32", "device": "cpu", "workers": 0}
    for views in (1, 4):
        generate.main(Generate(Path("checkpoints/run"), csv=Path(f"cache{views}.csv"), views=views, **common))
    for path in DATA.glob("features*.h5"):
        path.rename(path.with_suffix(".away"))
    generate.main(Generate(Path("checkpoints/run"), csv=Path("photos4.csv"), views=4, **common))
    cached, live, single = (log_probabilities(f"{name}.csv") for name in ("cache4", "photos4", "cache1"))
    for photo, (caption, value) in cached.items():
        assert live[photo] == (caption, pytest.approx(value, abs=1.5e-4))
    assert max(abs(single[photo][1] - value) for photo, (_, value) in cached.items()) > 5e-4


def test_captioning_with_views_that_are_not_cached_is_refused(four):
    train.main(settings("refused", epochs=1))
    with pytest.raises(
        UserError, match="--views 5: .*: no features of the view crop:3; run: python extract_f.* --views 5"
    ):
        generate.main(Generate(Path("checkpoints/refused"), data=DATA, views=5, precision="float32", device="cpu"))


# ---- mistakes: one line each


def refused(match, **changes):
    with pytest.raises(UserError, match=match) as error:
        trainer_of(**changes)
    assert "\n" not in str(error.value)


def test_a_view_of_another_recipe_is_refused_if_given_and_left_out_if_found(changed, capsys):
    extract_features.main(
        ExtractFeatures(DATA, **{**ENCODER, "image_size": 96}, grid="native", view="crop:7", overwrite=True)
    )
    refused(
        "features.crop7.h5: cannot be used with .*features.h5: .* with image_size 96, not 64; leave it out",
        features=(DATA / "features.h5", DATA / "features.crop7.h5"),
    )
    capsys.readouterr()
    assert trainer_of().state.views == ("whole", "crop:1", "flip", "flip+crop:2")
    assert "features.crop7.h5: not used with data/small/features.h5: it was extracted with" in capsys.readouterr().out


def test_a_view_half_done_is_refused_with_the_command_that_completes_it(changed):
    mark_not_done(DATA / "features.flip.h5", range(5))
    refused("features.flip.h5: no features for 5 of 20 images; run: python extract_features.py data/small --view flip$")


def test_a_view_of_another_data_set_is_refused(changed):
    other = Path("other")
    other.mkdir()
    write_captions(
        other / CAPTIONS_FILE, [Photo(p.image, "x" + p.id, p.split, p.captions) for p in read_captions(DATA)]
    )
    shutil.copy(encoder_file(DATA / "features.h5"), other / "features.flip.encoder.pt")
    extract_features.main(ExtractFeatures(other, **ENCODER, grid="native", view="flip"))
    refused("other/features.flip.h5: belongs to another data set", features=(DATA / VIEWS[0], other / VIEWS[2]))


def test_a_mirrored_view_alone_is_refused(four):
    refused(
        "features.flip.h5: only flip photos, but captions that say left or right, and validation, need the whole ones",
        features=(DATA / "features.flip.h5",),
    )


def test_files_are_found_by_their_names_beside_features_h5(four):
    assert [reader.path.name for reader in open_feature_files((), DATA).readers] == [
        "features.h5",
        "features.crop1.h5",
        "features.flip+crop2.h5",
        "features.flip.h5",
    ]


def test_one_view_needs_no_drawing(four):
    photos = CachedPhotos(trainer_of().train.split, np.arange(20) + 7, lambda rows: rows.tolist())
    photos.start_epoch(3)
    assert photos[np.array([2, 1])].photos == [9, 8]


# ---- parts


def test_a_run_on_parts_equals_one_on_the_whole_file_to_the_bit(changed, capsys):
    for name in VIEWS:
        (DATA / name).unlink()
    common = {**ENCODER, "grid": "native", "batch_size": 4}
    extract_features.main(ExtractFeatures(DATA, **common))
    train.main(settings("whole", epochs=2))
    parts = [DATA / f"features.part{number}of2.h5" for number in (1, 2)]
    for number, part in enumerate(parts, 1):
        shutil.copy(DATA / "features.encoder.pt", encoder_file(part))  # the same random weights
        extract_features.main(ExtractFeatures(DATA, **common, part=f"{number}/2"))
    expected = FeatureReader(DATA / "features.h5")
    (DATA / "features.h5").unlink()
    train.main(settings("parts", epochs=2))
    assert same(weights("parts"), weights("whole"))
    assert "features.part1of2.h5, data/small/features.part2of2.h5: read from the disk" in capsys.readouterr().out
    assert [*FeatureReader(parts[0]).ids, *FeatureReader(parts[1]).ids] == [*expected.ids]
    generate.main(Generate(Path("checkpoints/parts"), data=DATA, precision="float32", device="cpu"))
    parts[1].rename("away.h5")
    refused("no features for .* of 20 images; run: python extract_features.py data/small$")


def test_a_photo_found_twice_is_read_once_and_with_another_recipe_refused(changed):
    shutil.copy(DATA / "features.h5", "again.h5")
    mark_not_done(DATA / "features.h5", [2, 3])
    photos = trainer_of(features=(DATA / "features.h5", Path("again.h5"))).train
    assert photos.rows[:, 0].tolist() == [i + 24 * (i in (2, 3)) for i in range(24) if i % 6 != 5]
    extract_features.main(ExtractFeatures(DATA, **ENCODER, grid="native", dtype="float32", out=Path("exact.h5")))
    refused(
        "exact.h5: cannot be used with .*: it was extracted with dtype float32, not float16",
        features=(DATA / "features.h5", Path("exact.h5")),
    )
