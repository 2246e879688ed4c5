"""Load a module of Triton kernels, where the machine can compile and run them."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from captioning.runtime.library_errors import reason


class LoadedKernels(NamedTuple):
    """A module of kernels, or why there is none."""

    module: ModuleType | None
    unavailable: str | None  # a clause for a message, without a full stop; None if there is a module


@cache
def load_kernels(module: str, device: torch.device) -> LoadedKernels:
    """Import this module of kernels, and run its smoke_test(device), once per device. Raises nothing.

    What can go wrong, such as no Triton, no C compiler for it, or an unsupported GPU, raises a different error each.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return LoadedKernels(None, "the device is not an NVIDIA GPU")
    try:
        kernels = importlib.import_module(module)
        kernels.smoke_test(device)
    except ModuleNotFoundError as error:
        return LoadedKernels(None, f"{error.name} is not installed")
    except Exception as error:
        return LoadedKernels(None, f"Triton does not work here: {reason(error)}")
    return LoadedKernels(kernels, None)
