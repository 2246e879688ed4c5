"""What every test shares: one thread, no screen, and the data beside the project, where it is."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.small import make_small_data  # noqa: E402

torch.set_num_threads(1)  # small tensors: threads only get in each other's way
hypothesis.settings.register_profile("house", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos, captions and weights beside the project."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no real data beside the project (../shared)")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder data/small of 24 tiny photos with captions; see tests/small.py. Tests only read it."""
    return make_small_data(tmp_path_factory.mktemp("small"))
