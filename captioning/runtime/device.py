"""Devices, precisions and random number generators."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from captioning.errors import UserError
from captioning.runtime.library_errors import reason

# of memory that CUDA and cuBLAS take for themselves: torch raises no OutOfMemoryError for it
GPU_MEMORY_ERRORS = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def pick_device(name: str) -> torch.device:
    """The device of this name. `auto` is the GPU if there is one. Each process of torchrun uses a different GPU.

    Raises UserError if this machine does not have the device.
    """
    if name == "auto":
        name = _default_device()
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return _gpu_of_local_rank(int(os.environ["LOCAL_RANK"]))
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        available = ", ".join(_available_devices())
        raise UserError(f"--device {name}: not on this machine, which has {available}") from None
    return _make_current(device) if device.type == "cuda" else device


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _gpu_of_local_rank(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(f"--nproc-per-node: this machine has {count} GPUs, one for each process; lower it")
    return _make_current(torch.device("cuda", local_rank))


def _make_current(device: torch.device) -> torch.device:
    """Make a GPU the current one: Triton launches kernels there, and CUDA graphs are captured there."""
    torch.cuda.set_device(device)
    return torch.device("cuda", torch.cuda.current_device())


def _available_devices() -> list[str]:
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*devices, "mps"] if torch.backends.mps.is_available() else devices


def encoder_precision(name: str, device: torch.device) -> torch.dtype:
    """The precision of a frozen encoder, whose rounding stays in the cache: `auto` is float16 on a GPU, else float32.

    float16 has three more bits of mantissa than bfloat16, whose error reaches 6 % at the end of a MobileNetV2.
    """
    if name != "auto":
        return _requested_dtype(name, device)
    return torch.float16 if device.type == "cuda" else torch.float32


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The precision of training and of decoders: `auto` is bfloat16 if the device computes in it, else float32."""
    if name != "auto":
        return _requested_dtype(name, device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_computes_in("bfloat16") else torch.float32


@functools.cache  # so the warning is printed once
def _requested_dtype(name: str, device: torch.device) -> torch.dtype:
    if device.type == "cpu" and name != "float32" and _cpu_flags() and not _cpu_computes_in(name):
        print(f"--precision {name}: this processor only emulates it, many times slower than float32 (--precision auto)")
    return getattr(torch, name)


def _cpu_computes_in(name: str) -> bool:
    """Whether the CPU has instructions for this dtype, bfloat16 or float16."""
    short = {"bfloat16": "bf16", "float16": "fp16"}[name]
    return f"avx512_{short}" in _cpu_flags() or f"amx_{short}" in _cpu_flags()


def _cpu_flags() -> str:
    """The feature flags of the CPU; empty if the system does not list them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Compute matrix products in `precision`; float32 changes nothing."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextlib.contextmanager
def oom_as_user_error(remedy: str) -> Iterator[None]:
    """Turn running out of memory, on the GPU or the CPU, into a UserError that ends in `remedy`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory on the GPU: {remedy}") from None
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in GPU_MEMORY_ERRORS):
            raise UserError(f"out of memory on the GPU: {remedy}") from None
        if "allocate memory" not in str(error):
            raise
        raise UserError(f"out of memory: {remedy}") from None


@contextlib.contextmanager
def lost_gpu_as_user_error(remedy: str) -> Iterator[None]:
    """Turn an error of the GPU, which this process cannot use after it, into a UserError that ends in `remedy`."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("CUDA error"):
            raise
        raise UserError(f"the GPU failed ({reason(error)}); {remedy}") from None


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_pinning_failed = False  # the system denied page-locked memory once: it is not asked again


def empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor in page-locked memory, from which a GPU copies asynchronously.

    Where the system denies such memory, as WSL2 and a limit on locked memory do, it lies in ordinary memory, and one
    line is printed, once.
    """
    return _pinned(lambda: torch.empty(shape, dtype=dtype, pin_memory=True), lambda: torch.empty(shape, dtype=dtype))


def pin(tensor: Tensor) -> Tensor:
    """The tensor in page-locked memory, or as it is where the system denies that: see `empty_pinned`."""
    return _pinned(tensor.pin_memory, lambda: tensor)


def _pinned(in_locked_memory: Callable[[], Tensor], in_ordinary_memory: Callable[[], Tensor]) -> Tensor:
    global _pinning_failed
    if not _pinning_failed:
        try:
            return in_locked_memory()
        except RuntimeError as error:
            _pinning_failed = True
            print(
                f"no page-locked memory ({reason(error)}): batches are copied to the GPU from ordinary memory, which "
                "is slower; raise the limit on locked memory (ulimit -l)"
            )
    return in_ordinary_memory()


def rng_state(device: torch.device) -> dict:
    """The states of torch's random number generators as tensors: "cpu", and "cuda" on a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict, device: torch.device) -> None:
    """Set torch's random number generators to what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def restored(state: Sequence[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Context manager: afterwards, these tensors and the random number generators are as they were before."""
    saved = [tensor.clone() for tensor in state]
    random_numbers = rng_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(state, saved, strict=True):
                tensor.copy_(values)
        restore_rng(random_numbers, device)
