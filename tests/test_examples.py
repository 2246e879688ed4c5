"""The notebook runs from its first cell to its last, and does what it says."""

import json
import sys
from pathlib import Path

from PIL import Image

from captioning.captioner import Captioner
from captioning.decoders import DECODERS

NOTEBOOK = Path(__file__).parents[1] / "examples" / "kantu.ipynb"


def code_cells():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cell(source, names):
    """Run a cell -> the value of its last line, which a notebook shows, if that is an expression."""
    *body, last = source.rsplit("\n", 1)
    try:
        expression = compile(last, "<cell>", "eval")
    except SyntaxError:
        exec(compile(source, "<cell>", "exec"), names)
        return None
    exec(compile("".join(body), "<cell>", "exec"), names)
    return eval(expression, names)


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch, capsys, times):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(DECODERS, "_entries", dict(DECODERS._entries))
    settings, *cells = code_cells()
    names = {"__name__": "__main__"}
    run_cell(settings, names)
    assert set(names) >= {"SCENES", "EPOCHS"}
    if times(True, False):
        names |= {"SCENES": 20, "EPOCHS": 1}
    shown = [run_cell(cell, names) for cell in cells]
    assert sum(isinstance(value, Image.Image) for value in shown) == 2
    assert capsys.readouterr().out.count("a reference:") >= 2
    assert Captioner.load("checkpoints/notebook-gru").decoder_name == "my-gru"
    assert json.loads(NOTEBOOK.read_text("utf-8"))["cells"][0]["source"]


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_a_decoder_of_ones_own_takes_40_lines():
    (source,) = [cell for cell in code_cells() if "class GruDecoder" in cell]
    assert len([line for line in source.splitlines() if line.strip()]) <= 40
