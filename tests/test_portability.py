"""Windows, where commands end in one line and the library imports; IPython, where a command leaves nothing behind."""

import builtins
import importlib
import logging
import os
import runpy
import signal
import sys
import types
import warnings
from pathlib import Path

import pytest
import tqdm.std

from captioning.errors import UserError
from captioning.runtime import command_line, signals
from captioning.runtime.quiet import quiet
from captioning.runtime.start import WINDOWS, start_command
from config import Dashboard
from tests.test_architecture import SOURCES

MISSING_MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
MISSING_NAMES = {
    os: ("fork", "forkpty", "getppid", "getuid", "geteuid", "killpg", "mkfifo", "sysconf", "uname", "O_NOFOLLOW"),
    signal: ("SIGKILL", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGUSR1", "alarm", "pthread_sigmask", "sigwait"),
}
COMMANDS = sorted(
    str(path) for path in SOURCES.values() if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)


@pytest.fixture
def windows(monkeypatch):
    """This process without what Windows lacks."""
    importlib.import_module("matplotlib.figure")  # before: on Windows it imports modules that are not here
    for name in MISSING_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for module, names in MISSING_NAMES.items():
        for name in names:
            monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")


def test_every_command_is_known_here():
    names = {"train.py", "generate.py", "extract_features.py", "__main__.py", "demo.py", "dashboard.py", "export.py"}
    assert {Path(path).name for path in COMMANDS} >= names


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: Path(path).name)
def test_on_windows_every_command_ends_in_one_line_before_it_imports_anything_of_weight(path, windows, monkeypatch):
    monkeypatch.setattr(sys, "argv", [path])
    for heavy in ("torch", "numpy", "tyro", "tqdm"):
        monkeypatch.setitem(sys.modules, heavy, None)  # an import of it would raise ImportError
    with pytest.raises(SystemExit) as end:
        runpy.run_path(path, run_name="__main__")
    assert end.value.code == WINDOWS and "\n" not in WINDOWS and "WSL2" in WINDOWS


def test_the_page_that_the_line_names_exists():
    assert "docs/windows.md" in WINDOWS and (Path(__file__).parents[1] / "docs/windows.md").is_file()


def ours() -> dict[str, types.ModuleType]:
    """Our modules that have been imported."""
    packages = ("captioning", "preprocess", "config")
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}


@pytest.fixture
def not_imported():
    """Our modules as if none had been imported; afterwards as they were."""
    before = ours()
    for name in before:
        del sys.modules[name]
    yield
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


def test_the_library_imports_and_captions_without_what_windows_lacks(here, windows, not_imported):
    for name in SOURCES:
        if name.startswith(("captioning", "preprocess")) and "__main__" not in name and "timm" not in name:
            importlib.import_module(name)
    captioner = sys.modules["captioning.captioner"].Captioner.load("checkpoints/attention")
    assert captioner.caption("data/small/photos/0.png").words is not None


# ---- IPython


@pytest.fixture
def session(monkeypatch):
    """IPython, which sets this name, as far as a command can see it."""
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup, and a shell's background, ignore it
    yield
    signal.signal(signal.SIGINT, before)


def traces():
    """What a command could leave behind."""
    handlers = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    levels = {name: logging.getLogger(name).level for name in ("", "timm", "huggingface_hub", "tornado.general")}
    return handlers, dict(os.environ), levels, sys.stdout.errors, warnings.filters.copy()


def touch_everything(config):
    """A command that changes what a session would notice."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["HOME"] = "elsewhere"
    del os.environ["PATH"]
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if config.port == 1:
        raise UserError("a mistake")
    if config.port == 2:
        raise OSError("the disk is full")
    if config.port == 3:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("port, status", [(0, None), (1, "error: a mistake"), (2, "error: the output: "), (3, 130)])
def test_a_command_leaves_nothing_behind_in_ipython(session, monkeypatch, port, status):
    monkeypatch.setattr(sys, "argv", ["dashboard", "--port", str(port or 80)])
    before = traces()
    start_command()
    assert traces() == before
    if status is None:
        command_line.run(Dashboard, touch_everything)
    else:
        with pytest.raises(SystemExit) as end:
            command_line.run(Dashboard, touch_everything)
        assert end.value.code == status or str(end.value.code).startswith(str(status))
    assert traces() == before
    print("stdout still reaches the session", flush=True)


def test_a_script_ends_in_one_line_while_it_imports_and_ipython_is_left_alone(session, monkeypatch):
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    start_command()
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before
    monkeypatch.delattr(builtins, "__IPYTHON__")
    try:
        start_command()
        assert {signal.getsignal(number) for number in signals.STOP_SIGNALS} == {signals._exit_at_once}
    finally:
        for number, handler in zip(signals.STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def test_loggers_of_other_libraries_are_quiet_only_while_we_call_them(caplog):
    log = logging.getLogger("some.library")
    with quiet("some.library"):
        log.warning("within")
    log.warning("after")
    assert caplog.messages == ["after"]


def notebook(monkeypatch, has_widgets):
    """Import our tqdm as in a Jupyter kernel -> the class of its bars, and whether anybody was warned."""
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    widgets = types.SimpleNamespace(IProgress=object if has_widgets else None)
    settings = {"WARN_NOIPYW": "IProgress not found", "tqdm": type("NotebookBar", (tqdm.std.tqdm,), {}), "trange": None}
    widgets.__dict__.update(settings)
    monkeypatch.setitem(sys.modules, "tqdm.notebook", widgets)
    for name in ("tqdm.auto", "tqdm.autonotebook", "captioning.runtime.progress"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bar = importlib.import_module("captioning.runtime.progress").tqdm
    return [base.__name__ for base in bar.__mro__], caught


@pytest.mark.parametrize("has_widgets", [True, False])
def test_a_notebook_has_its_own_bars_and_without_widgets_those_of_a_terminal_without_warning(monkeypatch, has_widgets):
    bases, caught = notebook(monkeypatch, has_widgets)
    assert ("NotebookBar" in bases) == has_widgets and not caught
