"""Which arithmetic is chosen, and what is said of a choice that costs."""

import pytest
import torch

from captioning.runtime import device

CPU = torch.device("cpu")


@pytest.fixture(params=["avx2", "avx512_bf16", "amx_bf16", "amx_fp16", ""])
def flags(request, monkeypatch):
    """Of processors; "" where the system does not tell."""
    monkeypatch.setattr(device, "_cpu_flags", lambda: f"flags : sse {request.param}" if request.param else "")
    device._requested_dtype.cache_clear()
    yield request.param
    device._requested_dtype.cache_clear()


def test_a_decoder_trains_in_bfloat16_by_itself_only_where_the_processor_computes_in_it(flags, capsys):
    expected = torch.bfloat16 if flags.endswith("bf16") else torch.float32
    assert device.pick_precision("auto", CPU) == expected
    assert device.encoder_precision("auto", CPU) == torch.float32
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, unit", [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "")])
def test_a_precision_that_the_processor_only_imitates_is_given_and_said_to_be_slow_once(flags, capsys, name, unit):
    for pick in (device.pick_precision, device.encoder_precision, device.pick_precision):
        assert pick(name, CPU) == getattr(torch, name)
    slow = flags and not flags.endswith(unit)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == bool(slow) and all(line.startswith(f"--precision {name}: this processor") for line in said)
