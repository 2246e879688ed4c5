"""Views of photos: cached beside the whole photos, drawn anew in every epoch, averaged when captioning."""

import os
import shlex
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import extract_features
from captioning.encoders.images import Transform, read_photos
from captioning.encoders.loading import encoder_from_checkpoint, read_encoder_checkpoint
from captioning.encoders.views import MIN_SIDE, View, crop_box, first_views
from captioning.errors import UserError
from captioning.features import photo_files
from captioning.features.feature_files import open_feature_files
from captioning.features.feature_reader import FeatureReader
from captioning.features.feature_writer import FeatureWriter, mark_not_done
from captioning.runtime import command_line
from config import ExtractFeatures
from preprocess.captions import CAPTIONS_FILE, Photo, read_captions, write_captions
from tests.small import ENCODER

PHOTOS = 12
NAMES = ["", ".flip", ".crop1", ".flip+crop2"]  # of the files of --views 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A data folder of 12 JPEGs of 90x70 pixels, with the four views that --views 4 writes at once."""
    folder = tmp_path_factory.mktemp("views")
    rng = np.random.default_rng(0)
    for i in range(PHOTOS):
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), np.uint8)).save(folder / f"{i}.jpg")
    records = [Photo(str(folder / f"{i}.jpg"), f"photo{i}", "train", (("a",),)) for i in range(PHOTOS)]
    write_captions(folder / CAPTIONS_FILE, records)
    extract(folder, views=4)
    return folder


def extract(data, **settings):
    extract_features.main(ExtractFeatures(data, **{**ENCODER, "batch_size": 5, **settings}))


@pytest.fixture
def copied(photos, tmp_path):
    """A copy of the data folder, whose tests may change it."""
    shutil.copytree(photos, tmp_path / "copy")
    records = [Photo(str(tmp_path / f"copy/{i}.jpg"), f"photo{i}", "train", (("a",),)) for i in range(PHOTOS)]
    for path in (tmp_path / "copy").glob("*.jpg"):
        shutil.copystat(photos / path.name, path)
    write_captions(tmp_path / "copy" / CAPTIONS_FILE, records)
    return tmp_path / "copy"


# ---- what a view is


@pytest.mark.parametrize("name", ["whole", "flip", "crop:1", "flip+crop:2", "crop:31"])
def test_a_view_has_a_name_that_gives_it_back(name):
    assert str(View.parse(name)) == name


@pytest.mark.parametrize(
    "name", ["", "crop", "crop:0", "crop:-1", "flip+", "+crop:1", "flipcrop:1", "flip+whole", "Flip"]
)
def test_another_name_is_refused_in_one_line(name):
    with pytest.raises(UserError, match="--view .*: must be whole, flip, crop:N or flip.crop:N"):
        ExtractFeatures(Path("data"), view=name)


def test_views_are_listed_from_the_whole_photo_on_each_only_once():
    assert [*map(str, first_views(6))] == ["whole", "flip", "crop:1", "flip+crop:2", "crop:3", "flip+crop:4"]
    assert len({view.file(Path("features.h5")) for view in first_views(20)}) == 20


def test_a_crop_lies_within_the_photo_and_keeps_most_of_each_side():
    boxes = [crop_box(640, 480, f"photo{i}", number) for i in range(300) for number in (1, 2)]
    left, top, right, bottom = np.array(boxes).T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 640).all() and (bottom <= 480).all()
    for kept in ((right - left) / 640, (bottom - top) / 480):
        assert kept.min() >= MIN_SIDE - 0.002 and kept.max() > 0.98 and abs(kept.mean() - (1 + MIN_SIDE) / 2) < 0.01
    assert len(set(boxes)) > 590, "every photo and number has a crop of its own"
    assert crop_box(1, 1, "tiny", 1) == (0, 0, 1, 1)


def test_a_crop_is_the_same_on_every_machine_and_in_every_version():
    assert crop_box(640, 480, "照片1", 1) == (29, 51, 617, 468)


# ---- extraction


def test_several_views_at_once_equal_each_view_alone_byte_for_byte(photos, tmp_path):
    for name, view in zip(NAMES, first_views(4), strict=True):
        extract(photos, view=str(view), out=tmp_path / f"features{name}.h5")
        assert (tmp_path / f"features{name}.h5").read_bytes() == (photos / f"features{name}.h5").read_bytes()
        assert FeatureReader(photos / f"features{name}.h5").attributes["view"] == str(view)


def test_a_row_is_the_encoders_map_of_the_mirrored_and_cropped_photo(photos):
    reader = FeatureReader(photos / "features.flip+crop2.h5")
    encoder = encoder_from_checkpoint(read_encoder_checkpoint(reader.path)).eval()
    left, top, right, bottom = crop_box(90, 70, "photo3", 2)
    crop = read_photos([photos / "3.jpg"], [0], Transform(64), lambda photo, _: photo[top:bottom, left:right][:, ::-1])
    expected = encoder(crop.photos).cells.detach()
    np.testing.assert_allclose(reader.read(np.array([3])).cells.float(), expected, rtol=1e-2, atol=1e-2)
    whole = FeatureReader(photos / "features.h5").read(np.array([3])).cells.float()
    assert (whole - expected).norm() > 0.1 * expected.norm()


def test_interrupted_views_resume_to_the_same_files_and_encode_no_row_again(photos, tmp_path, monkeypatch):
    out = tmp_path / "features.h5"
    written = []
    write = FeatureWriter.write

    def interrupted_in_the_second_batch(self, rows, *values):
        written.append((self.path.name, *rows))
        if len(written) == 6:  # the second view of the second batch
            raise KeyboardInterrupt
        write(self, rows, *values)

    monkeypatch.setattr(FeatureWriter, "write", interrupted_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        extract(photos, views=4, out=out)
    extract(photos, views=4, out=out)
    assert written[6] == ("features.flip.h5", 5, 6, 7, 8, 9), "the whole photos of the second batch are on disk"
    for name in NAMES:
        assert (tmp_path / f"features{name}.h5").read_bytes() == (photos / f"features{name}.h5").read_bytes()


def test_a_photo_is_decoded_once_for_all_views(photos, tmp_path, monkeypatch):
    opened = []
    open_photo = Transform.open
    monkeypatch.setattr(Transform, "open", lambda self, path: opened.append(path) or open_photo(self, path))
    shutil.copy(photos / "features.encoder.pt", tmp_path / "features.encoder.pt")  # nothing is left to calibrate
    extract(photos, views=3, out=tmp_path / "features.h5")
    assert sorted(opened) == sorted(str(photos / f"{i}.jpg") for i in range(PHOTOS))


def test_the_size_of_all_views_is_said_before_they_are_extracted(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extract_features, "extract_rows", lambda *arguments: print("extracting"))
    extract(photos, views=4, out=tmp_path / "features.h5", grid="native")
    *plan, total, last = capsys.readouterr().out.splitlines()
    assert last == "extracting" and total == "all 4 views: 0.00 GB"
    assert "flip+crop2.h5: 12 photos, resnet18.layer2, 8x8 cells of 128, stored as 8x8x128" in plan[-1]


def test_all_views_together_must_fit_on_the_disk(photos, tmp_path, monkeypatch):
    size = PHOTOS * (14 * 14 * 128 * 2 + 128 * 4 + 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 3 * size))
    with pytest.raises(UserError, match="features.h5: needs 0.0 GB in 4 files and the disk has 0.0 GB free"):
        extract(photos, views=4, out=tmp_path / "features.h5")
    assert not (tmp_path / "features.h5").exists()
    extract(photos, views=3, out=tmp_path / "features.h5")


def test_verify_encodes_the_view_again(copied, capsys):
    extract(copied, views=4, verify=True)
    assert capsys.readouterr().out.count("12 of 12 rows are done and undamaged") == 4
    with h5py.File(copied / "features.flip.h5", "r+") as file:
        file.attrs["view"] = np.bytes_(b"crop:1")
    with pytest.raises(UserError, match=r"features.flip.h5: the row of photo\d+ differs by"):
        extract(copied, view="flip", verify=True)


def test_info_says_the_view_of_each_file(photos, capsys):
    extract(photos, views=2, info=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "view whole" in printed and "view flip" in printed


def test_a_file_of_another_view_is_not_resumed(photos):
    with pytest.raises(UserError, match="features.flip.h5: was extracted with view flip, not crop:1; give --overwrite"):
        extract(photos, view="crop:1", out=photos / "features.flip.h5")


def test_a_file_of_before_has_the_view_of_the_whole_photo_and_resumes_without_the_new_array(copied):
    path = copied / "features.h5"
    with h5py.File(path, "r+") as file:
        del file.attrs["view"]
        del file["photo_files"]
        expected = file["features"][:]
        file["features"][4] = 0
    mark_not_done(path, [4])
    extract(copied, batch_size=1)
    with h5py.File(path) as file:
        np.testing.assert_allclose(file["features"][:], expected, rtol=1e-2, atol=1e-2)


def test_views_that_contradict_other_flags_are_refused():
    with pytest.raises(UserError, match="--views 4 names the views itself: leave out --view flip"):
        ExtractFeatures(Path("data"), views=4, view="flip")
    with pytest.raises(UserError, match="--nvjpeg decodes whole photos only"):
        ExtractFeatures(Path("data"), views=2, nvjpeg=True)


def test_a_photo_that_changed_since_is_named_and_made_anew_in_every_view(copied, capsys):
    Image.new("RGB", (70, 50), "red").save(copied / "4.jpg")
    with h5py.File(copied / "features.flip.h5") as file:
        before = file["features"][:]
    extract(copied, views=2)
    printed = capsys.readouterr().out
    assert printed.count(f"changed: {copied}/4.jpg") == 2
    assert "features.flip.h5: 1 photos have changed since they were encoded, and are encoded again" in printed
    with h5py.File(copied / "features.flip.h5") as file:
        differs = (file["features"][:] != before).any((1, 2, 3))
    assert np.flatnonzero(differs).tolist() == [4]
    extract(copied, views=2)
    assert "have changed" not in capsys.readouterr().out


# ---- parts


def rows_by_photo(path):
    """Photo -> the bytes of its row, of all arrays."""
    reader = FeatureReader(path)
    rows = np.arange(len(reader.ids))
    stored = [reader.read_stored(rows, name) for name in reader.arrays if name != "done"]
    assert reader.done().all()
    return {photo: tuple(values[row].tobytes() for values in stored) for row, photo in enumerate(reader.ids)}


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_the_rows_of_all_parts_are_those_of_the_whole_byte_for_byte(photos, tmp_path, dtype):
    settings = {"dtype": dtype, "batch_size": 2, "view": "flip"}
    extract(photos, out=tmp_path / "whole.h5", **settings)
    rows = {}
    for part in ("1/3", "2/3", "3/3"):
        path = tmp_path / f"part{part[0]}.h5"
        extract(photos, out=path, part=part, **settings)
        extract(photos, out=path, verify=True)
        assert not rows.keys() & rows_by_photo(path).keys()
        rows |= rows_by_photo(path)
    assert rows == rows_by_photo(tmp_path / "whole.h5")


@pytest.mark.parametrize("number, parts", [(12, 1), (12, 5), (12, 12), (1_000, 7), (123_287, 4), (3, 2)])
def test_each_photo_is_in_one_part_and_parts_are_about_equal(number, parts):
    ranges = [extract_features.part_of(number, part, parts) for part in range(1, parts + 1)]
    assert [i for indices in ranges for i in indices] == list(range(number))
    assert max(map(len, ranges)) <= 1.5 * number / parts + 1


def test_parts_are_named_by_their_number_and_view(photos):
    assert ExtractFeatures(photos, part="2/4").file == photos / "features.part2of4.h5"
    assert [path.name for path in ExtractFeatures(photos, part="2/4", views=2).files.values()] == [
        "features.part2of4.h5",
        "features.part2of4.flip.h5",
    ]


@pytest.mark.parametrize("part", ["0/4", "5/4", "1", "a/b", "1/4/2", "-1/4", "²/4", ""])
def test_a_part_that_does_not_exist_is_refused(photos, part):
    if part:
        with pytest.raises(UserError, match=f"--part {part}: must be a number and how many parts there are"):
            ExtractFeatures(photos, part=part)
    else:
        with pytest.raises(UserError, match="--part 1/13: has no photos, there are 12 in all; give fewer parts"):
            extract(photos, part="1/13", out=photos / "no.h5")


@pytest.fixture
def grown(copied):
    """The copied folder, whose data set has six more photos than its feature files."""
    records = []
    for i in range(PHOTOS + 6):
        if i >= PHOTOS:
            Image.fromarray(np.full((40, 50, 3), 9 * i, np.uint8)).save(copied / f"{i}.jpg")
        records.append(Photo(str(copied / f"{i}.jpg"), f"photo{i}", "train", (("a",),)))
    write_captions(copied / CAPTIONS_FILE, [*records[9:], *records[:9]])
    return copied


def test_missing_only_extracts_what_no_other_file_holds(grown, capsys):
    (grown / "other.h5").write_bytes(b"no feature file")
    shutil.copy(grown / "features.encoder.pt", grown / "part2.encoder.pt")  # else calibrated on the new photos
    extract(grown, missing_only=True, out=grown / "part2.h5")
    assert [*FeatureReader(grown / "part2.h5").ids] == [f"photo{i}" for i in range(12, 18)]
    extract(grown, missing_only=True, out=grown / "part3.h5")
    assert f"{grown}/part3.h5: not written: the other files hold all photos" in capsys.readouterr().out
    assert not (grown / "part3.h5").exists()
    mark_not_done(grown / "part2.h5", [1])
    extract(grown, missing_only=True, out=grown / "part2.h5")
    assert "part2.h5: 6 photos" in capsys.readouterr().out and FeatureReader(grown / "part2.h5").done().all()


def test_a_grown_reordered_and_shrunk_data_set_keeps_every_row_that_is_right(grown, capsys):
    before = rows_by_photo(grown / "features.h5")
    extract_features.main(ExtractFeatures(grown, workers=0, device="cpu"))  # the settings are those of the file
    printed = capsys.readouterr().out
    assert "features.h5: the data set has changed: the rows of 12 photos are kept, 6 are new, 0 " in printed
    assert "12 photos done, 6 to do" in printed
    rows = rows_by_photo(grown / "features.h5")
    assert [*rows] == [f"photo{i}" for i in (*range(9, 18), *range(9))]
    assert len(rows) == 18 and before.items() <= rows.items()
    lines = (grown / CAPTIONS_FILE).read_text().splitlines(keepends=True)
    (grown / CAPTIONS_FILE).write_text("".join(lines[5:2:-1]))
    extract_features.main(ExtractFeatures(grown, workers=0, device="cpu"))
    kept = rows_by_photo(grown / "features.h5")
    assert [*kept] == ["photo14", "photo13", "photo12"] and kept.items() <= rows.items()
    assert not (grown / "features.h5.new").exists()


def test_a_kill_while_rows_are_kept_leaves_the_file_as_it_was(grown, monkeypatch):
    before = (grown / "features.h5").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("captioning.features.feature_writer.FeatureWriter._write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        extract(grown)
    assert (grown / "features.h5").read_bytes() == before


def test_with_a_hash_a_photo_that_was_only_touched_counts_as_unchanged(copied, capsys, monkeypatch):
    hashed, hash_of = [], photo_files._hash
    monkeypatch.setattr(photo_files, "_hash", lambda path: hashed.append(path) or hash_of(path))
    extract(copied, out=copied / "hashed.h5", photo_hash=True)
    extract(copied, out=copied / "hashed.h5", photo_hash=True)
    assert len(hashed) == 2 * PHOTOS, "each is read once to be encoded, and once to be compared"
    for photo in (copied / "1.jpg", copied / "2.jpg"):
        os.utime(photo, (1, 1))
    content = bytearray((copied / "2.jpg").read_bytes())
    content[len(content) // 2] ^= 1  # of the same size
    (copied / "2.jpg").write_bytes(content)
    capsys.readouterr()
    extract(copied, out=copied / "hashed.h5")
    printed = capsys.readouterr().out
    assert printed.count("changed: ") == 1 and f"changed: {copied}/2.jpg" in printed


def test_the_remedies_of_a_file_that_lacks_photos_are_commands_that_work(grown, capsys):
    def remedy(check):
        with pytest.raises(UserError, match="run: python extract_features.py") as error:
            check()
        arguments = shlex.split(str(error.value).partition("extract_features.py ")[2])
        extract_features.main(command_line.parse(ExtractFeatures, [*arguments, "--workers", "0", "--device", "cpu"]))

    def check():
        files = open_feature_files([], grown, views=["whole"])
        photos = [photo.id for photo in read_captions(grown)]
        located = files.locate(photos)
        files.check_dataset(located, grown)
        files.available(files.rows_of_views(located), files.views[0], 0.01, grown)

    before = FeatureReader(grown / "features.h5").attributes
    remedy(check)
    check()
    lines = (grown / CAPTIONS_FILE).read_text()
    (grown / CAPTIONS_FILE).write_text(lines.replace('"id": "', '"id": "other-'))
    remedy(check)
    check()
    assert FeatureReader(grown / "features.h5").attributes == before


def test_missing_only_completes_each_view_by_itself(grown):
    (grown / "features.crop1.h5").unlink()
    shutil.copy(grown / "features.encoder.pt", grown / "new.encoder.pt")
    extract(grown, missing_only=True, view="crop:1", out=grown / "new.h5")
    assert len(FeatureReader(grown / "new.h5").ids) == 18
    assert FeatureReader(grown / "new.h5").attributes["view"] == "crop:1"


def test_missing_only_with_another_recipe_than_the_files_it_completes_is_refused(grown):
    with pytest.raises(
        UserError, match="part2.h5: would have grid native, but .*features.h5, which .*, has 14; give the"
    ):
        extract(grown, missing_only=True, out=grown / "part2.h5", grid="native")
    assert not (grown / "part2.h5").exists()
    with pytest.raises(UserError, match="--missing-only needs --out FILE"):
        ExtractFeatures(grown, missing_only=True)
