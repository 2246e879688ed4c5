"""Recipes: files of flags that --recipe adds to a command line."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys

import pytest

from captioning.errors import UserError
from captioning.runtime.command_line import parse, run
from captioning.runtime.recipes import FOLDER, read_recipe
from captioning.runtime.settings import as_plain_data
from captioning.training.options import TrainingOptions
from captioning.viewing.model_card import train_command
from config import Train
from tests.test_training_options import default_of


def train(*flags):
    return parse(Train, ["data/x", "--run", "a", *flags])


def differences(first, second):
    """The settings in which two commands differ on a CPU."""
    first, second = (as_plain_data(options.for_device("cpu")) for options in (first, second))
    return {name: (value, second[name]) for name, value in first.items() if value != second[name]}


@pytest.fixture
def recipe(tmp_path):
    """Writes lines to a recipe -> its path."""

    def recipe(*lines):
        path = tmp_path / "mine.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    return recipe


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("*.txt")])
def test_every_recipe_in_the_folder_is_a_valid_command_from_any_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = ["--start-from", "checkpoints/best"] if name.endswith("-cider") else []
    assert train("--recipe", name, *start).recipe == name
    assert capsys.readouterr().out.startswith(f"recipe {name}: --")


def test_help_names_the_recipes_in_the_folder():
    names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.txt")))
    assert f"# flags of recipes/NAME.txt ({names})" in inspect.getsource(TrainingOptions)


def test_the_recipe_tutorial_is_the_bare_command():
    changed = differences(train("--recipe", "tutorial"), train())
    assert changed.pop("recipe") == ("tutorial", None)
    assert {"embedding_size", "dropout"} <= changed.keys(), "None leaves a decoder's default"
    for setting, values in changed.items():
        assert values == (default_of("attention", setting), None), setting


def test_a_recipe_is_the_flags_in_it_and_flags_that_are_typed_win(recipe, capsys):
    path = recipe("# mine", "", "--batch-size 64  # captions", "--epochs=7", "--fine-tune", "--flip", "--no-kernels")
    typed = ["--batch-size", "64", "--epochs", "7", "--fine-tune", "--flip", "--no-kernels"]
    assert differences(train("--recipe", path), train(*typed)) == {"recipe": (path, None)}
    changes = ["--epochs", "9", "--batch_size=32", "--no-flip", "--kernels"]
    capsys.readouterr()
    mine = train(f"--recipe={path}", *changes)
    assert capsys.readouterr().out == f"recipe {path}: --fine-tune\n", "what is printed is what is used"
    assert differences(mine, train("--fine-tune", "--epochs", "9", "--batch-size", "32")) == {"recipe": (path, None)}


@pytest.mark.parametrize(
    "line, message",
    [
        ("--bach-size 3", "unrecognized options: --bach-size, 3; perhaps you meant --batch-size"),
        ("--epochs many", "--epochs: must be INT, not 'many'"),
        ("--epochs", "--epochs: needs a value"),
        ("--epochs 3 4", "unrecognized options: 4"),
        ("--decoder none", "--decoder none: must be one of adaptive, "),
        ("--epochs 0", "--epochs 0: must be 1 or more"),
        ("--objective cider", "--objective cider improves a trained run"),
        ("epochs 3", "must be one flag and its value, such as --batch-size 32, not: epochs 3"),
        ("--epochs 3 --patience 2", "must be one flag and its value"),
        ("--seed 1", "--seed is given in line 1 already"),
        ("--recipe best", "a recipe cannot use another one"),
        ("--run 'a", "No closing quotation"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_one_line_with_its_file_and_line(line, message, recipe, capsys):
    path = recipe("--seed 0", "", line)
    with pytest.raises((SystemExit, UserError)) as error:
        train("--recipe", path)
    text = capsys.readouterr().err or f"error: {error.value}"
    assert text.startswith(f"error: {path}, line 3: {message}") and text.count("\n") <= 1


def test_train_without_any_word_says_what_it_requires(capsys):
    with pytest.raises(SystemExit):
        parse(Train, [])
    assert capsys.readouterr().err.startswith("error: PATH is required")


@pytest.mark.parametrize("typed", [["--recipe="], ["--recipe", ""]])
def test_a_recipe_without_a_name_is_refused_not_left_out(typed):
    with pytest.raises(UserError, match="no such recipe; give one of best"):
        train(*typed)


def test_a_recipe_may_come_from_any_editor_and_hold_any_value(recipe):
    path = recipe("\ufeff# byte order mark\f, page\x85 and\u2028 line\r", "--start-from a#1  # not #2\r", "--dashboard")
    expected = train("--start-from", "a#1", "--dashboard")
    assert differences(train("--recipe", path), expected) == {"recipe": (path, None)}


@pytest.mark.parametrize("value", ["'a b' # 'c", '"a \\" # b"# c', r"a\#b \'c#", "a'#'b \"#\" ''#", "a # it's"])
def test_the_words_of_a_line_are_those_of_bash(value, recipe):
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {value}"], capture_output=True, text=True, check=True).stdout
    path = recipe(f"--features {value}")
    assert read_recipe(path).flags[0].words[1:] == words.split("\0")[:-1]


def test_a_terminal_without_chinese_characters_can_show_a_recipe(recipe, monkeypatch):
    path = recipe("--run 看图")
    monkeypatch.setattr(sys, "argv", ["train.py", "data/x", "--recipe", path])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    run(Train, lambda config: None)
    assert sys.stdout.buffer.getvalue().decode() == f"recipe {path}: --run '\\u770b\\u56fe'\n"


def test_a_mistake_in_what_is_typed_is_not_blamed_on_the_recipe(recipe, capsys):
    path = recipe("--batch-size 512")
    with pytest.raises(SystemExit):
        train("--recipe", path, "--bach-size", "512")
    assert capsys.readouterr().err.startswith("error: unrecognized options: --bach-size")
    with pytest.raises(UserError, match=r"^--batch-size 0"):
        train("--recipe", path, "--batch-size", "0")


def test_a_recipe_that_is_not_there_is_one_line_that_names_those_that_are(tmp_path):
    with pytest.raises(UserError, match="--recipe bset: no such recipe; give one of best, .*tutorial, or a file"):
        train("--recipe", "bset")
    with pytest.raises(UserError, match="mine.txt: no such recipe"):
        train("--recipe", str(tmp_path / "mine.txt"))
    with pytest.raises(UserError, match="cannot be read"):
        train("--recipe", f"{tmp_path}/")


def test_settings_of_a_run_name_the_recipe_and_hold_its_flags():
    config = as_plain_data(train("--recipe", "best"))
    assert config["recipe"] == "best" and config["batch_size"] == 512
    assert "--batch-size 512" in train_command(config, "again") and "--recipe" not in train_command(config, "again")
