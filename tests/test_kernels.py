"""The GPU kernels against the plain decoder: in Triton's interpreter on a CPU, and on a GPU where there is one."""

import gc
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from captioning.decoders import attention, fused_ops
from captioning.encoders.grid import Grid, pooling_matrix
from captioning.runtime.device import autocast
from tests.test_decoders import LENGTHS, PHOTO, VARIANTS, make

ROOT = Path(__file__).parents[1]
KERNELS = (
    "_attention_kernel",
    "_attention_backward_kernel",
    "_keys_backward_kernel",
    "_lstm_kernel",
    "_lstm_backward_kernel",
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def train_outputs(decoder, grid, packed):
    """Logits, attention_sum and all gradients of one training step."""
    decoder.zero_grad()
    logits, attention_sum, _ = decoder(grid, packed, PHOTO.to(decoder.score.weight.device))
    upstream = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    ((logits.float() * upstream).sum() + (1 - attention_sum).square().mean()).backward()
    return [logits.float().detach(), attention_sum.detach(), *(parameter.grad for parameter in decoder.parameters())]


def make_attention(device="cpu", native_side=8, output_side=14):
    """A soft attention decoder in float32, the grid of 3 photos and packed words."""
    decoder, grid, _, _, packed = make("attention")
    decoder = decoder.float().to(device)
    decoder.score.weight.data *= 10  # a peaked attention
    pooling = pooling_matrix(native_side, output_side)
    grid = Grid(grid.cells[:, : native_side**2].float(), torch.kron(pooling, pooling).float())
    return decoder, grid.to(torch.device(device), torch.float32), packed


def run_and_find_leaks(decoder, run):
    """Call run() -> its result, and the names of the parameters whose autograd graph outlives it.

    A reference cycle that holds the graph would keep the keys in memory, and tie the stream on which the graph was made
    to a capture on another stream (see captioning/training/cuda_graphs.py).
    """

    def accumulate_grad(parameter):  # autograd creates a new node when nothing holds the last one
        return parameter.view_as(parameter).grad_fn.next_functions[0][0]

    gc.disable()
    try:
        nodes = [accumulate_grad(parameter) for parameter in decoder.parameters()]
        for node in nodes:
            node.metadata["before"] = True
        result = run()
        nodes.clear()
        del node
        leaks = [name for name, parameter in decoder.named_parameters() if accumulate_grad(parameter).metadata]
        return result, leaks
    finally:
        gc.enable()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_autograd_graph_outlives_its_step(variant):
    decoder, grid, _, _, packed = make(variant)
    decoder.train()

    def step():
        decoder(grid, packed, PHOTO).logits.sum().backward()

    assert run_and_find_leaks(decoder, step)[1] == []
    outputs = []
    assert run_and_find_leaks(decoder, lambda: outputs.append(decoder(grid, packed, PHOTO)))[1], "a leak is found"


class RecordingKernel:
    """A kernel that records the options of each launch."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append(options)
            self.kernel[grid](*arguments, **options)

        return launch


def compare_in_interpreter(monkeypatch, native_side, output_side):
    """Run in a process with TRITON_INTERPRET=1, where kernels run on a CPU."""
    from captioning.decoders import kernels

    decoder, grid, packed = make_attention("cpu", native_side, output_side)
    expected = train_outputs(decoder, grid, packed)
    monkeypatch.setattr(attention, "kernels_for", lambda cells: kernels)
    for name, block in (("A_BLOCK", 2), ("C_BLOCK", 4), ("H_BLOCK", 4), ("KEY_CELLS", 16)):  # several rounds of each
        monkeypatch.setattr(kernels, name, block)
    recorders = [RecordingKernel(getattr(kernels, name)) for name in KERNELS]
    for name, recorder in zip(KERNELS, recorders, strict=True):
        monkeypatch.setattr(kernels, name, recorder)
    found, leaks = run_and_find_leaks(decoder, lambda: train_outputs(decoder, grid, packed))
    for value, expected_value in zip(found, expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-6)
    assert leaks == []
    for recorder in recorders:  # else Triton 3.9 warns
        assert recorder.launches and all(options["enable_fp_fusion"] for options in recorder.launches)
    print("equal")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="is tested on the GPU instead")
def test_the_kernels_compute_what_the_plain_decoder_does(times):
    sides = times(3, 8), times(5, 14)
    code = (
        "import pytest, tests.test_kernels as t\n"
        f"with pytest.MonkeyPatch.context() as m: t.compare_in_interpreter(m, *{sides})"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "equal\n"), run.stderr


SMALL = {"P": 25, "N": 9, "A": 20, "C": 40, "H": 30}
SMALL_BLOCKS = {"P_BLOCK": 32, "N_BLOCK": 16, "A_BLOCK": 16, "C_BLOCK": 16, "H_BLOCK": 32}
FLOAT32_TENSORS = {  # in any precision
    "pooling",
    "score_weight",
    "attention",
    "d_attention",
    "d_scores",
    "d_score_weight",
    "cell",
    "new_hidden",
    "new_cell",
    "d_hidden",
    "d_cell",
    "d_old_cell",
}


def argument_type(name, dtype, sizes):
    if name in sizes:
        return "constexpr"
    if name == "num_tiles" or name.endswith("stride"):
        return "i32"
    if name in ("photo_index", "word_order", "word_offsets"):
        return "*i64"
    return "*fp32" if name in FLOAT32_TENSORS else f"*{dtype}"


def compile_kernels(dtype, sizes):
    """Compile all kernels for an H100, which need not be present. Warnings about floating-point fusion are errors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from captioning.decoders import kernels

    options = {**kernels.LAUNCH_OPTIONS, "num_warps": 8}
    for name in KERNELS:
        function = getattr(kernels, name)
        types = {argument: argument_type(argument, dtype, sizes) for argument in function.arg_names}
        constants = {(i,): sizes[argument] for i, argument in enumerate(function.arg_names) if argument in sizes}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*FP_FUSION")
            source = ASTSource(function, types, constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]


@needs_triton
def test_the_kernels_compile_without_a_gpu(monkeypatch, tmp_path, request):
    """The compiler is stricter than the interpreter."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pytest.importorskip("triton", "3.3")
    from captioning.decoders import kernels

    compile_kernels("bf16", {**SMALL, **SMALL_BLOCKS})
    if request.config.getoption("--torture"):
        blocks = {"A_BLOCK": kernels.A_BLOCK, "C_BLOCK": kernels.C_BLOCK, "H_BLOCK": kernels.H_BLOCK}
        cells = {"P": 196, "N": 64, "P_BLOCK": 256, "N_BLOCK": 64}
        compile_kernels("fp32", {**cells, **blocks, "A": 512, "C": 2048, "H": 512})
        compile_kernels("bf16", {**cells, **blocks, "A": 100, "C": 1280, "H": 300})


def test_the_kernels_apply_where_the_features_need_no_gradient(monkeypatch):
    monkeypatch.setattr(fused_ops, "_load_kernels", lambda device: "kernels")
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    class GpuCells:
        is_cuda, requires_grad, device = True, False, "cuda:0"

        def element_size(self):
            return 2

    cells = GpuCells()
    assert fused_ops.kernels_for(cells) == "kernels"
    with fused_ops.use_kernels(False):
        assert fused_ops.kernels_for(cells) is None
    assert fused_ops.kernels_for(cells) == "kernels"
    cells.requires_grad = True
    assert fused_ops.kernels_for(cells) is None
    assert fused_ops.kernels_for(torch.zeros(2)) is None


@needs_triton
def test_attention_runs_without_kernels_that_do_not_compile_and_prints_why_once(monkeypatch, capsys):
    from captioning.decoders import kernels

    def no_compiler(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(kernels, "smoke_test", no_compiler)
    for _ in range(2):
        assert fused_ops._load_kernels(torch.device("cuda:99")) is None
    assert capsys.readouterr().out == (
        "the attention decoder runs without its fused GPU kernels, which is slower: Failed to find C compiler\n"
    )


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("precision, rtol, atol", [(torch.float32, 1e-3, 1e-5), (torch.bfloat16, 0.1, 0.03)])
def test_the_kernels_on_a_gpu_compute_what_the_plain_decoder_does(monkeypatch, precision, rtol, atol):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    decoder, grid, packed = make_attention("cuda")
    packed, grid = packed.to("cuda"), grid.to(torch.device("cuda"), precision)
    assert fused_ops.kernels_for(grid.cells), "else the plain decoder is compared with itself"
    with autocast(torch.device("cuda"), precision):
        found = train_outputs(decoder, grid, packed)
        monkeypatch.setattr(attention, "kernels_for", lambda cells: None)
        expected = train_outputs(decoder, grid, packed)
    for value, expected_value in zip(found, expected, strict=True):
        torch.testing.assert_close(
            value, expected_value, rtol=rtol, atol=atol * max(1.0, float(expected_value.abs().max()))
        )


@needs_gpu
def test_the_gradients_of_the_kernels_are_deterministic():
    decoder, grid, packed = make_attention("cuda")
    packed = packed.to("cuda")
    assert sum(LENGTHS) == len(packed.data)
    first = train_outputs(decoder, grid, packed)
    for _ in range(3):
        assert all(map(torch.equal, first, train_outputs(decoder, grid, packed)))
