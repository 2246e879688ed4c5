"""tqdm for terminals and notebooks. A notebook without ipywidgets has the terminal's bars, without tqdm's warning."""

from __future__ import annotations

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # "IProgress not found"
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
