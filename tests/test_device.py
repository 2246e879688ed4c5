"""Which precision is chosen, and the warning about a slow choice."""

import pytest
import torch

from captioning.encoders.gpu_decoding import FileBatch
from captioning.encoders.images import PhotoBatch
from captioning.errors import UserError
from captioning.runtime import device

CPU = torch.device("cpu")


@pytest.fixture(params=["avx2", "avx512_bf16", "amx_bf16", "amx_fp16", ""])
def cpu_flag(request, monkeypatch):
    """A flag of the processor; "" if the system does not list any."""
    flags = f"flags : sse {request.param}" if request.param else ""
    monkeypatch.setattr(device, "_cpu_flags", lambda: flags)
    device._requested_dtype.cache_clear()
    yield request.param
    device._requested_dtype.cache_clear()


def test_a_decoder_trains_in_bfloat16_by_default_only_if_the_processor_computes_in_it(cpu_flag, capsys):
    expected = torch.bfloat16 if cpu_flag.endswith("bf16") else torch.float32
    assert device.pick_precision("auto", CPU) == expected
    assert device.encoder_precision("auto", CPU) == torch.float32
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, unit", [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "")])
def test_a_precision_that_the_processor_only_emulates_is_used_with_one_warning(cpu_flag, capsys, name, unit):
    for pick in (device.pick_precision, device.encoder_precision, device.pick_precision):
        assert pick(name, CPU) == getattr(torch, name)
    is_slow = bool(cpu_flag) and not cpu_flag.endswith(unit)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == is_slow
    assert all(line.startswith(f"--precision {name}: this processor") for line in lines)


@pytest.mark.parametrize("name, local_rank, index", [("cuda:1", None, 1), ("cuda", "1", 1), ("cuda", None, 0)])
def test_the_gpu_of_a_run_becomes_the_current_one(monkeypatch, name, local_rank, index):
    """Triton launches kernels, and CUDA graphs are captured, on the current GPU."""
    current = [0]
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(torch.device(device).index or 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert device.pick_device(name) == torch.device("cuda", index)
    assert current[-1] == index


@pytest.mark.parametrize(
    "error, message",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory on the GPU: buy more"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "out of memory on the GPU: buy more"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory on the GPU: buy more"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory: buy more"),
        (
            RuntimeError("CUDA error: device lost\nSearch"),
            "the GPU failed (CUDA error: device lost); resume",
        ),
    ],
)
def test_a_gpu_without_memory_and_a_lost_one_are_one_line(error, message):
    with pytest.raises(UserError) as caught:
        with device.lost_gpu_as_user_error("resume"), device.oom_as_user_error("buy more"):
            raise error
    assert str(caught.value) == message


def test_an_error_that_is_not_the_gpus_keeps_its_traceback():
    with pytest.raises(RuntimeError), device.lost_gpu_as_user_error("resume"), device.oom_as_user_error("buy more"):
        raise RuntimeError("shapes do not fit")


def test_where_page_locked_memory_is_denied_ordinary_memory_is_used_and_one_line_says_so(monkeypatch, capsys):
    """As under WSL2, and where `ulimit -l` is small."""
    attempts = []
    empty = torch.empty

    def denied(*arguments, pin_memory=False, **settings):
        if pin_memory:
            attempts.append(arguments)
            raise RuntimeError("CUDA error: OS call failed or operation not supported on this OS\nCUDA kernel errors")
        return empty(*arguments, **settings)

    monkeypatch.setattr(torch, "empty", denied)
    monkeypatch.setattr(device, "_pinning_failed", False)
    tensor = torch.ones(3)
    assert device.empty_pinned((2, 3), torch.float16).shape == (2, 3)
    assert device.empty_pinned((4,), torch.uint8).dtype == torch.uint8
    assert device.pin(tensor) is tensor
    photos = PhotoBatch([3], torch.ones(1, 3, 2, 2), ["a failure"])
    files = FileBatch(**(dict.fromkeys(FileBatch._fields, [1]) | {"jpegs": tensor, "decoded": photos}))
    assert files.pin_memory().jpegs is tensor and files.pin_memory().decoded.photos is photos.photos
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "OS call failed or operation not supported on this OS)" in printed
    assert "ulimit -l" in printed and len(attempts) == 1, "it is not asked again"
