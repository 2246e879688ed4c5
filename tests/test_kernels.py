"""The kernels for GPUs against the plain decoder: by Triton's interpreter on a CPU, and on a GPU where there is one."""

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from captioning.decoders import attention, fused_ops
from captioning.encoders.grid import Grid
from captioning.runtime.device import autocast
from tests.test_decoders import LENGTHS, PHOTO, VARIANTS, make

HOUSE = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def outcome(decoder, grid, packed):
    """Scores, coverage and all gradients."""
    decoder.zero_grad()
    scores, attention_sum, _ = decoder(grid, packed, PHOTO.to(decoder.score.weight.device))
    upstream = torch.linspace(-1, 1, scores.numel(), device=scores.device).view_as(scores)
    ((scores.float() * upstream).sum() + (1 - attention_sum).square().mean()).backward()
    return [scores.float().detach(), attention_sum.detach(), *(parameter.grad for parameter in decoder.parameters())]


def small(device="cpu"):
    decoder, grid, _, _, packed = make("attention")
    decoder = decoder.float().to(device)
    decoder.score.weight.data *= 10  # a peaked attention
    return decoder, Grid(grid.cells.float(), grid.pooling.float()).to(torch.device(device), torch.float32), packed


def watched(decoder, work):
    """-> what the work gives, and the parameters of which autograd's graph outlives it: a ring holds it.

    It would hold keys for long, and tie the stream it was made on to a capture of another (see cuda_graphs.py).
    """

    def end_of(parameter):  # where gradients arrive: autograd makes one anew when nothing holds the last
        return parameter.view_as(parameter).grad_fn.next_functions[0][0]

    gc.disable()
    try:
        ends = [end_of(parameter) for parameter in decoder.parameters()]
        for end in ends:
            end.metadata["seen"] = True
        found = work()
        ends.clear()
        del end
        return found, [name for name, parameter in decoder.named_parameters() if end_of(parameter).metadata]
    finally:
        gc.enable()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_graph_of_autograd_outlives_its_step(variant):
    decoder, grid, _, _, packed = make(variant)
    decoder.train()

    def step():
        decoder(grid, packed, PHOTO).logits.sum().backward()

    assert watched(decoder, step)[1] == []
    kept = []
    assert watched(decoder, lambda: kept.append(decoder(grid, packed, PHOTO)))[1], "else it sees nothing"


def compare_by_interpreter(monkeypatch):
    """In a process of its own, where Triton's functions run on a CPU."""
    from captioning.decoders import kernels

    decoder, grid, packed = small()
    plain = outcome(decoder, grid, packed)
    monkeypatch.setattr(attention, "kernels_for", lambda cells: kernels)
    monkeypatch.setattr(kernels, "A_BLOCK", 2)  # several rounds
    monkeypatch.setattr(kernels, "C_BLOCK", 4)
    monkeypatch.setattr(kernels, "H_BLOCK", 4)
    ours, outlived = watched(decoder, lambda: outcome(decoder, grid, packed))
    for one, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)
    assert outlived == []
    print("the same")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="is asked of the GPU instead")
def test_the_kernels_compute_what_the_plain_decoder_does():
    code = "import pytest, tests.test_kernels as t\nwith pytest.MonkeyPatch.context() as m: t.compare_by_interpreter(m)"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=HOUSE, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "the same\n"), run.stderr


@needs_triton
@pytest.mark.parametrize("half, a, c, h", [("fp32", 512, 2048, 512), ("bf16", 100, 1280, 300)])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(half, a, c, h, monkeypatch, tmp_path):
    """The interpreter is less strict than the compiler."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = pytest.importorskip("triton", "3.3")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from captioning.decoders import kernels

    upcast = {
        "pooling",
        "score",
        "attention",
        "d_attention",
        "d_scores",
        "gradients",
        "d_score",
        "cell",
        "new_hidden",
        "new_cell",
        "d_hidden",
        "d_cell",
        "d_old",
    }
    sizes = {
        "P": 196,
        "N": 64,
        "A": a,
        "C": c,
        "H": h,
        "P_BLOCK": 256,
        "N_BLOCK": 64,
        "A_BLOCK": kernels.A_BLOCK,
        "C_BLOCK": kernels.C_BLOCK,
        "H_BLOCK": kernels.H_BLOCK,
    }
    for function in (
        kernels._look,
        kernels._look_backward,
        kernels._keys_backward,
        kernels._gates,
        kernels._gates_backward,
    ):
        types = {}
        for name in function.arg_names:
            number = "i32" if name == "tiles" or name.endswith("stride") else None
            pointer = "*i64" if name in ("photo", "order", "ends") else "*fp32" if name in upcast else f"*{half}"
            types[name] = "constexpr" if name in sizes else number or pointer
        constants = {(i,): sizes[name] for i, name in enumerate(function.arg_names) if name in sizes}
        compiled = triton.compile(ASTSource(function, types, constants), target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]


def test_the_kernels_serve_where_nothing_asks_for_a_gradient_of_the_features(monkeypatch):
    monkeypatch.setattr(fused_ops, "_kernels", lambda device: "kernels")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    class Cells:
        is_cuda, requires_grad, device = True, False, "cuda:0"

        def element_size(self):
            return 2

    cells = Cells()
    assert fused_ops.kernels_for(cells) == "kernels"
    cells.requires_grad = True
    assert fused_ops.kernels_for(cells) is None
    assert fused_ops.kernels_for(torch.zeros(2)) is None


@needs_triton
def test_where_the_kernels_cannot_be_compiled_attention_goes_without_them_and_says_so(monkeypatch, capsys):
    from captioning.decoders import kernels

    def no_compiler(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(kernels, "try_out", no_compiler)
    for _ in range(2):
        assert fused_ops._kernels(torch.device("cuda:99")) is None
    said = capsys.readouterr().out
    assert said == "attention goes without its kernels for GPUs, which is slower: Failed to find C compiler.\n"


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("precision, rtol, atol", [(torch.float32, 1e-3, 1e-5), (torch.bfloat16, 0.1, 0.03)])
def test_the_kernels_on_a_gpu_compute_what_the_plain_decoder_does(monkeypatch, precision, rtol, atol):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    decoder, grid, packed = small("cuda")
    packed, grid = packed.to("cuda"), grid.to(torch.device("cuda"), precision)
    assert fused_ops.kernels_for(grid.cells), "else nothing is compared"
    with autocast(torch.device("cuda"), precision):
        ours = outcome(decoder, grid, packed)
        monkeypatch.setattr(attention, "kernels_for", lambda cells: None)
        plain = outcome(decoder, grid, packed)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol * max(1.0, float(other.abs().max())))


@needs_gpu
def test_gradients_by_the_kernels_are_the_same_every_time():
    decoder, grid, packed = small("cuda")
    packed = packed.to("cuda")
    assert sum(LENGTHS) == len(packed.data)
    first = outcome(decoder, grid, packed)
    for _ in range(3):
        assert all(map(torch.equal, first, outcome(decoder, grid, packed)))
