"""Full disks, folders without permission, and file names of all kinds: commands work or end with one line.

Once there is space, the same command ends as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import csv
import html.parser
import json
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from captioning.runtime.checkpoint import load_checkpoint
from tests.small import ENCODER as SMALL_ENCODER
from tests.small import make_small_data, same
from tests.torture.artefacts import EXTRACT, GENERATE, NOWHERE, RESUME, SCORE, TRAIN, run_ok
from tests.torture.commands import Outcome, bound_by_permissions, run_command

SPLIT = f"{GENERATE} --data data/small --length-penalty 9 --max-length 4"
WRITES = {  # what is written below out/ -> the command
    "data": "preprocess out/data --train aic.json data/small/photos --min-count 1 --workers 1",
    "features.h5": f"{EXTRACT} --out out/features.h5",
    "run": TRAIN,  # checkpoints/new is a link to out/run
    **{f"x.{kind}": f"{SPLIT} --{kind} out/x.{kind}" for kind in ("json", "csv", "html", "extremes", "scores")},
    "pictures": f"{SPLIT} --pictures out/pictures",
    "scored": f"{SCORE} --scores out/scored --csv out/scored.csv",
}


@pytest.fixture
def here(artefacts, monkeypatch):
    artefacts.enter(monkeypatch)
    Path("out").mkdir()
    Path("checkpoints/new").symlink_to("../out/run")
    yield artefacts.folder
    artefacts.restore()


def is_one_line(end: Outcome) -> bool:
    return end.status == 1 and end.stderr.startswith("error: ") and "\n" not in end.stderr


def outputs(what: str) -> object:
    """Read what the command writes, for comparison."""
    if what == "run":
        return load_checkpoint(Path("checkpoints/new/last.pt"))["decoder"]["state"]
    path = Path("out") / what
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    assert files and not [file for file in Path("out").rglob("*") if file.suffix in (".tmp", ".lock")]
    return {str(file): file.read_bytes() for file in files}


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def undisturbed(artefacts):
    """What each command writes when there is space."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        artefacts.enter(patch)
        Path("out").mkdir()
        Path("checkpoints/new").symlink_to("../out/run")
        for what, command in WRITES.items():
            Path("out/run").mkdir()
            run_ok(command)
            found[what] = outputs(what)
            empty(Path("out"))
        artefacts.restore()
    return found


def rerun(what: str, undisturbed: dict) -> None:
    """Run the same command again, with enough space: its outputs must equal those of an undisturbed run."""
    run_ok(f"{WRITES[what]} --resume" if what == "run" else WRITES[what])
    one, other = outputs(what), undisturbed[what]
    assert same(one, other) if what == "run" else one == other


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SIZES = [0, 100_000, 1_000, 1, 300, 3_000, 10_000, 30_000, 300_000, 700_000, 1_100_000, 2_000_000, 2_500_000, 3_000_000]


@pytest.mark.parametrize("what", WRITES)
def test_a_file_size_limit_gives_one_line_and_the_same_command_continues_without_it(
    here, undisturbed, what, times, tally
):
    refused = 0
    for size in SIZES[: times(2, len(SIZES))]:
        Path("out/run").mkdir()
        with files_no_larger_than(size):
            end = run_command(WRITES[what])
        assert end.status == 0 or is_one_line(end) and re.search("File too large|disk full", end.stderr), (size, end)
        refused += end.status == 1
        rerun(what, undisturbed)
        empty(Path("out"))
    assert refused
    tally("files that may not grow", refused)


@pytest.fixture
def small_disk(here):
    """Mount a file system of 12 MB on out/."""
    command = ["/bin/mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", here / "out"]
    if not Path(command[0]).exists() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield
    subprocess.run(["/bin/umount", "--lazy", here / "out"], check=True)  # a memory map may still be open


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_gives_one_line_and_the_same_command_continues_once_there_is_space(
    small_disk, undisturbed, what, times, tally
):
    refused = 0
    for free in [0, 400_000, 8_000, 30_000, 100_000, 1_200_000, 1_300_000, 2_600_000, 2_800_000][: times(1, 9)]:
        Path("out/run").mkdir()
        with open("out/others", "wb") as others:
            others.write(bytes(shutil.disk_usage("out").free - free))
        end = run_command(WRITES[what])
        assert end.status == 0 or is_one_line(end) and re.search("No space left|disk", end.stderr), (free, end)
        refused += end.status == 1
        Path("out/others").unlink()
        rerun(what, undisturbed)
        empty(Path("out"))
    assert refused
    tally("full disks", refused)


@pytest.mark.parametrize("what", WRITES)
def test_a_read_only_folder_gives_one_line_and_the_same_command_continues_with_permission(
    here, undisturbed, what, tally
):
    Path("out/run").mkdir()
    for folder in (Path("out/run"), Path("out")):
        folder.chmod(0o555)
    with bound_by_permissions():
        end = run_command(WRITES[what])
    for folder in (Path("out"), Path("out/run")):
        folder.chmod(0o755)
    assert is_one_line(end) and "Permission denied" in end.stderr and ("out/" in end.stderr or "new" in end.stderr), end
    rerun(what, undisturbed)
    tally("folders where nobody may write")


@pytest.mark.parametrize(
    "folder, command",
    [
        ("data/small/photos", WRITES["data"]),
        ("data/small", EXTRACT),
        ("data/small", TRAIN),
        ("data/small", SPLIT),
        ("data/small/photos", f"{GENERATE} data/small/photos"),
        ("checkpoints", f"{GENERATE} data/small/photos/0.png"),
        ("checkpoints/att", RESUME),
        ("checkpoints/att", f"dashboard --replay checkpoints/att {NOWHERE}"),
        ("data/small", SCORE),
        ("data/scenes", "preprocess data/scenes --scenes 20 --overwrite"),
    ],
)
def test_a_folder_without_permission_gives_one_line(here, folder, command, tally):
    Path(folder).chmod(0)
    with bound_by_permissions():
        end = run_command(command)
    Path(folder).chmod(0o755)
    assert is_one_line(end) and folder in end.stderr, end
    tally("folders that nobody may enter")


# ---- names

NAMES = ["with space", "照片", "🐶", "new\nline", "quo'te\"", "% {x} $HOME `id` &amp; <b>", "x -dash", "\udcff"]
ALL_AT_ONCE = "a b 照片 🐶\n' \" % {x} $HOME <b>&"


class PageText(html.parser.HTMLParser):
    """The text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.found = ""
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.found += data


def named_data(name: str) -> dict[str, str]:
    """Write photos/ and annotations in which every file name contains `name`. Return the val captions by id."""
    small = make_small_data(Path("small"))
    photos = Path("photos")
    photos.mkdir()
    ids = [f"{name} {i}.png" for i in range(12)]
    for i, id in enumerate(ids):
        shutil.copy(small / "photos" / f"{i}.png", photos / id)
    captions = {id: f"一个{'红蓝'[i % 2]}色的正方形" for i, id in enumerate(ids)}
    parts = {"train": ids[:8], "val": ids[8:]}
    for split, some in parts.items():
        Path(f"{split}.json").write_text(
            json.dumps([{"image_id": id, "caption": [captions[id]]} for id in some]), encoding="utf-8"
        )
    return {id: captions[id] for id in parts["val"]}


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("name", [ALL_AT_ONCE, *NAMES])
def test_all_commands_accept_names_of_all_kinds(tmp_path, monkeypatch, name, absolute, times, tally):
    if (name != ALL_AT_ONCE or absolute) and times(0, 1) == 0:
        pytest.skip("one name contains all of these; the others run with --torture")
    here = tmp_path / name
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", "")
    base = here if absolute else Path("")
    val = named_data("x" if name == "\udcff" else name)  # annotations refuse names that are not valid text
    data = f"{base / 'data' / name}"
    ann = ["--train", base / "train.json", base / "photos", "--val", base / "val.json", base / "photos"]
    run_ok("preprocess --min-count 1 --workers 1", *ann, "--", data)
    recipe = EXTRACT.split("data/small")
    run_ok(recipe[0], *recipe[1].split(), "--", data)
    train = TRAIN.split("data/small")
    run_ok(train[0], *train[1].split(), "--", data)
    shutil.move("checkpoints/new", f"checkpoints/{name}")
    outputs = {kind: base / f"{name}.{kind}" for kind in ("json", "csv", "html", "submission", "scores", "extremes")}
    flags = [word for kind, path in outputs.items() for word in (f"--{kind}", path)]
    more = "generate.py --device cpu --workers 0 --length-penalty 9 --max-length 4"
    run = base / "checkpoints" / name
    run_ok(more, "--data", data, "--pictures", base / f"{name} drawn", *flags, "--", run)
    assert [line["image_id"] for line in json.loads(outputs["json"].read_text())] == list(val)
    with open(outputs["csv"], encoding="utf-8-sig", newline="") as file:
        assert [line["photo"] for line in csv.DictReader(file)] == list(val)
    text = PageText(outputs["html"].read_text("utf-8")).found
    assert all(id in text for id in val) and text.count("CIDEr-D") == len(val)
    assert len(list((base / f"{name} drawn").iterdir())) == len(val)
    stdout = run_ok(more, "--", run, base / "photos").splitlines()
    assert len(stdout) == 12, "one line per photo"
    run_ok("generate.py --references", data, "--score", outputs["json"])
    end = run_command(f"dashboard {NOWHERE}", "--replay", run)
    assert is_one_line(end) and "does not answer" in end.stderr
    end = run_command(more, "--", run, base / "no such photo")
    assert is_one_line(end) and "no such photo" in end.stderr
    tally("names of all kinds")


def test_each_unreadable_photo_gives_one_line_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named_data("new\nline")
    Path("photos/new\nline 3.png").write_bytes(b"no photo")
    run_ok("preprocess data --min-count 1 --train train.json photos --val val.json photos")
    settings = [word for flag, value in SMALL_ENCODER.items() for word in (f"--{flag.replace('_', '-')}", value)]
    stdout = run_ok("extract_features.py data --allow-missing 0.1", *settings)
    assert "skipped: photos/new\\nline 3.png: not an image\n" in stdout
    assert Path("data/features.unreadable.txt").read_text(encoding="utf-8") == "photos/new\\nline 3.png: not an image\n"
