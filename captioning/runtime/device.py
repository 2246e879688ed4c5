"""Where the arithmetic runs, and in which precision."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import torch

from captioning.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; of torchrun's processes each takes a GPU of its own.

    Raises UserError for a device that is not there.
    """
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        place, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= gpus:
            raise UserError(f"--nproc-per-node: this machine has {gpus} GPUs, one for each process; lower it")
        torch.cuda.set_device(place)
        return torch.device("cuda", place)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise UserError(f"--device {name}: not on this machine, which has {', '.join(there)}") from None
    return device


def encoder_precision(name: str, device: torch.device) -> torch.dtype:
    """Of a frozen encoder, whose rounding stays in the cache: `auto` is float16 on a GPU, else float32.

    float16 has three bits more than bfloat16, which is 6 % off at the end of a MobileNetV2.
    """
    if name != "auto":
        return _asked_for(name, device)
    return torch.float16 if device.type == "cuda" else torch.float32


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Of a decoder, and of all that is trained: `auto` is bfloat16 where the device computes in it, else float32."""
    if name != "auto":
        return _asked_for(name, device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_computes_in("bfloat16") else torch.float32


@functools.cache  # said once
def _asked_for(name: str, device: torch.device) -> torch.dtype:
    if device.type == "cpu" and name != "float32" and _cpu_flags() and not _cpu_computes_in(name):
        print(f"--precision {name}: this processor only imitates it, many times slower than float32 (--precision auto)")
    return getattr(torch, name)


def _cpu_computes_in(name: str) -> bool:
    short = {"bfloat16": "bf16", "float16": "fp16"}[name]
    return f"avx512_{short}" in _cpu_flags() or f"amx_{short}" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `precision`; nothing changes for float32."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextlib.contextmanager
def oom_as_user_error(remedy: str) -> Iterator[None]:
    """Raises UserError, ending in `remedy`, where the memory of the GPU, or of the machine, does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on the GPU: {remedy}") from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise UserError(f"out of memory: {remedy}") from None


def rng_state(device: torch.device) -> dict:
    """The random generators as plain tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
