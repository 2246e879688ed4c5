"""Versions, the GPU, and the ceilings that every other figure is compared with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from ceilings import disk_bandwidth, host_bandwidth, peak_bandwidth, peak_operations

from gpu_steps.common import Row, Setting

PACKAGES = ("torch", "torchvision", "triton", "numpy", "h5py")


def environment(setting: Setting) -> Iterator[Row]:
    """Versions, device and ceilings."""
    for package in PACKAGES:
        yield Row(package, package_version(package))
    yield Row("python", platform.python_version(), note=f"{os.cpu_count()} CPU cores")
    if setting.device.type == "cuda":
        yield from describe_gpu(setting.device)
    scale = setting.scale
    precisions = ("float32", "bfloat16", "float16") if setting.device.type == "cuda" else ("float32",)
    for precision in precisions:
        operations = peak_operations(setting.device, getattr(torch, precision), scale.matrix_side)
        note = f"{scale.matrix_side} x {scale.matrix_side} x {scale.matrix_side}"
        yield Row(f"matrix product, {precision}", operations / 1e12, "TFLOP/s", note=note)
    bandwidth = peak_bandwidth(setting.device, scale.copy_bytes)
    yield Row("copy on the device, read and written", bandwidth / 1e9, "GB/s")
    pinned = "pinned" if setting.device.type == "cuda" else ""
    yield Row("copy from main memory", host_bandwidth(setting.device, scale.copy_bytes) / 1e9, "GB/s", note=pinned)
    written, read = disk_bandwidth(setting.folder, scale.disk_bytes)
    yield Row("disk, written with a sync", written / 1e9, "GB/s")
    yield Row("disk, read", read / 1e9, "GB/s", note="after dropping it from the page cache, where the system does so")


def package_version(name: str) -> str:
    """The installed version, or that there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def describe_gpu(device: torch.device) -> Iterator[Row]:
    """Name, memory, L2 cache, CUDA and driver."""
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    yield Row(
        "GPU", properties.name, note=f"{properties.multi_processor_count} SMs, sm_{properties.major}{properties.minor}"
    )
    yield Row("memory", total / 1e9, "GB", note=f"{free / 1e9:.1f} GB free")
    yield Row("L2 cache", getattr(properties, "L2_cache_size", 0) / 1e6, "MB")
    yield Row("CUDA", str(torch.version.cuda), note=f"driver {driver_version()}")


def driver_version() -> str:
    """The version of NVIDIA's driver, from nvidia-smi or the system."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            found = re.search(r"\d+\.\d+(\.\d+)?", file.read())
    except OSError:
        found = None
    return found[0] if found else "unknown"
