"""The architecture: who imports whom, and what every command line promises."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config
from captioning.errors import UserError
from captioning.runtime import command_line
from captioning.search.options import SearchOptions

ROOT = Path(__file__).parents[1]
# Who may import whom: a module imports its own floor and those below it.
FLOORS = [
    {"captioning", "captioning.errors"},
    {"captioning.runtime"},
    {"preprocess"},
    {"captioning.encoders", "captioning.features", "captioning.dataset", "captioning.caption"},
    {"captioning.decoders"},
    {"captioning.search"},
    {"captioning.training", "captioning.evaluation", "captioning.viewing", "captioning.doctor"},
    {
        "captioning.captioner",
        "captioning.photo_grids",
        "captioning.calibrate",
        "captioning.export",
        "captioning.web",
        "captioning.serve",
        "captioning.dashboard",
        "captioning.runs",
        "captioning.share",
        "captioning.truth",
    },
    {"config"},
    {"preprocess.__main__", "extract_features", "train", "generate", "demo"},
]
COMMANDS_FLOOR = len(FLOORS) - 1
SHORTEST = {  # the shortest valid command line of each command
    config.Preprocess: ["data/scenes", "--scenes", "20"],
    config.ExtractFeatures: ["data/scenes"],
    config.Train: ["data/scenes", "--run", "att"],
    config.Dashboard: [],
    config.Runs: [],
    config.Export: ["checkpoints/att"],
    config.Share: ["pack", "checkpoints/att", "att-packed"],
    config.Calibrate: ["checkpoints/att"],
    config.Serve: ["site"],
    config.Truth: ["checkpoints/att"],
    config.Generate: ["checkpoints/att", "photo.jpg"],
}
COMMANDS = [
    value
    for value in vars(config).values()
    if dataclasses.is_dataclass(value) and not value.__name__.endswith("Options")
]
DEFAULT = re.compile(r"\s*\((default|required|optional|repeatable)\b.*\)$")


def files_of_the_house() -> list[Path]:
    """Every file we wrote: not what git, environments, caches and the commands themselves write."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        here = Path(folder)
        hidden = [name for name in folders if name.startswith(".") and name != ".ci"]
        skipped = {*hidden, "__pycache__", "build", *(name for name in folders if name.endswith(".egg-info"))}
        if here in (ROOT / "data", ROOT / "checkpoints"):
            skipped, names = set(folders), ["README.md"]
        folders[:] = [name for name in folders if name not in skipped]
        found += [here / name for name in names if name != ".git"]  # a file in a second work tree
    return sorted(found)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for path in files_of_the_house()
    if path.suffix == ".py" and path.relative_to(ROOT).parts[0] not in ("tests", "bench")
}


def imports(module: str) -> set[str]:
    """Our modules that this one imports, anywhere in the file.

    Two blocks do not count: `if TYPE_CHECKING`, which never runs, and `if __name__ == "__main__"`, in which a module of
    the library is a command.
    """
    path = SOURCES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and re.search("TYPE_CHECKING|__main__", ast.unparse(node.test))
        for inner in itertools.chain.from_iterable(map(ast.walk, node.body))
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            submodules = {f"{base}.{alias.name}" for alias in node.names} & SOURCES.keys()
            names |= submodules or {base}
    return names & (SOURCES.keys() - {module})


def floor(module: str) -> int:
    """The floor of the longest name in FLOORS that the module's name begins with."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, rooms in enumerate(FLOORS):
            if ".".join(parts[:length]) in rooms and (length > 1 or len(parts) == 1 or parts[0] != "captioning"):
                return number
    raise AssertionError(f"{module}: is on no floor; add it to FLOORS")


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_its_own_floor_and_those_below(module):
    above = {name for name in imports(module) if floor(name) > floor(module)}
    assert not above, f"{module} imports {above}"


@pytest.mark.parametrize("module", [name for name in SOURCES if floor(name) == COMMANDS_FLOOR])
def test_commands_never_import_each_other(module):
    commands = {name for name in imports(module) if floor(name) == COMMANDS_FLOOR}
    assert not commands, f"{module} imports {commands}"


def test_preprocessing_depends_on_errors_and_runtime_alone():
    allowed = ("captioning.errors", "captioning.runtime", "preprocess")
    for module in SOURCES:
        if module.startswith("preprocess") and floor(module) < COMMANDS_FLOOR:
            assert all(name.startswith(allowed) for name in imports(module)), module


def test_the_errors_import_nothing():
    tree = ast.parse(SOURCES["captioning.errors"].read_text("utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(node) for node in found] == ["from __future__ import annotations"]


def test_listing_the_choices_of_the_command_line_loads_no_torch():
    code = "import sys, config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_imports_never_run_in_a_circle():
    finished = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for name in imports(module):
                visit(name, [*path, module])
            finished.add(module)

    for module in SOURCES:
        visit(module, [])


def test_no_file_names_a_package_host_or_a_developers_folder():
    foreign = re.compile(r"pypi\.org|pythonhosted\.org|index-ur[l]|find-link[s]|(?<!\w)/(?:home|Users|root|work)/\w")
    found = []
    for path in files_of_the_house():
        if path.suffix in (".py", ".md", ".toml", ".txt", ".sh", "") or path.parent.name == ".ci":
            text = path.read_text("utf-8")
            found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in foreign.finditer(text)]
    assert not found


def test_every_command_is_tried_here():
    assert set(COMMANDS) == set(SHORTEST)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_shortest_command_line_is_valid(command):
    assert isinstance(command_line.parse(command, SHORTEST[command]), command)


def help_texts(help_page: str) -> dict[str, str]:
    """What --help says of each flag and place, such as {"--epochs INT": "at most"}, without the defaults.

    An entry starts two columns in, a box's edge counting as one; its text is on that line, or deep in on the next.
    """
    texts = {}
    for entry in re.split(r"\n[│ ] (?=--?\w|[\[{A-Z])", help_page)[1:]:
        first, *more = (line.strip("│ ") for line in entry.splitlines()[:2])
        flag, _, text = first.partition("  ")
        texts[flag] = DEFAULT.sub("", (text or "".join(more)).strip())
    return texts


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_setting(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.parse(command, ["--help"])
    assert not stop.value.code
    texts = help_texts(capsys.readouterr().out)
    names = {field.name for field in dataclasses.fields(command)}
    if "search" in names:  # its settings are flags of the command
        names = names - {"search"} | {field.name for field in dataclasses.fields(SearchOptions)}
    assert len(texts) == len(names) + 1  # and --help itself
    assert [flag for flag, text in texts.items() if not text or text in names] == []  # tyro falls back on the name


@pytest.mark.parametrize(
    "flags",
    [
        ["--flip"],
        ["--crop", "0.9"],
        ["--checkpoint-activations"],
        ["--encoder", "resnet18"],
        ["--weights", "random"],
        ["--image-size", "64"],
        ["--unfreeze-from", "layer4"],
    ],
)
def test_what_only_fine_tuning_can_do_is_refused_without_it(flags):
    with pytest.raises(UserError, match=f"{flags[0]} requires --fine-tune"):
        command_line.parse(config.Train, ["data/x", "--run", "a", *flags])
    assert command_line.parse(config.Train, ["data/x", "--run", "a", "--fine-tune", *flags]).fine_tune


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_is_one_line_and_exit_status_2(command, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.parse(command, [*SHORTEST[command], "--no-such-flag", "3"])
    stderr = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.fullmatch(r"error: .*--no-such-flag.*\n", stderr), stderr


def test_the_tested_versions_let_visdom_build_and_serve():
    versions = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    assert versions["visdom"] == "0.2.4"
    assert int(versions["setuptools"].split(".")[0]) < 81
    assert tuple(map(int, versions["tornado"].split(".")[:2])) < (6, 6)


def test_the_installed_visdom_imports_beside_a_tornado_it_can_serve_with():
    if importlib.util.find_spec("visdom") is None:
        pytest.skip("the dashboard extra is not installed")
    import visdom.server  # noqa: F401

    assert tuple(map(int, importlib.metadata.version("tornado").split(".")[:2])) < (6, 6)
