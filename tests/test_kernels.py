"""The GPU kernels against the plain decoder: in Triton's interpreter on a CPU, and on a GPU where there is one."""

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from captioning.decoders import attention, fused_ops
from captioning.encoders.grid import Grid, pooling_matrix
from captioning.features.quantization import dequantize_rows
from captioning.runtime.device import autocast
from captioning.runtime.kernel_loading import LoadedKernels, load_kernels
from tests.test_bench import bench
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
    decoder, _, _, _, packed = make("attention")
    decoder = decoder.float().to(device)
    decoder.score.weight.data *= 10  # a peaked attention
    pooling = pooling_matrix(native_side, output_side)
    grid = Grid(torch.randn(3, native_side**2, 6), torch.kron(pooling, pooling).float())
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
    """Attention and LSTM, for a map of native_side and a grid of output_side squared."""
    from captioning.decoders import kernels

    decoder, grid, packed = make_attention("cpu", native_side, output_side)
    expected = train_outputs(decoder, grid, packed)
    monkeypatch.setattr(attention, "kernels_for", lambda cells: kernels)
    blocks = kernels.attention_blocks(output_side**2, native_side**2)
    quarter = max(4, blocks["P_BLOCK"] // 4)
    blocks.update({"A_BLOCK": 2, "C_BLOCK": 4, "POOL_BLOCK": quarter})  # several rounds of each
    monkeypatch.setattr(kernels, "attention_blocks", lambda num_cells, num_native: blocks)
    monkeypatch.setattr(kernels, "KEYS_BLOCKS", {"P_BLOCK": quarter, "A_BLOCK": 2})
    monkeypatch.setattr(kernels, "H_BLOCK", 4)
    recorders = [RecordingKernel(getattr(kernels, name)) for name in KERNELS]
    for name, recorder in zip(KERNELS, recorders, strict=True):
        monkeypatch.setattr(kernels, name, recorder)
    found, leaks = run_and_find_leaks(decoder, lambda: train_outputs(decoder, grid, packed))
    for value, expected_value in zip(found, expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-4, atol=1e-6)
    assert leaks == []
    for recorder in recorders:  # else Triton 3.9 warns
        assert recorder.launches and all(options["enable_fp_fusion"] for options in recorder.launches)


def check_dequantize(device):
    """The kernel that decodes 8-bit features against its plain form."""
    from captioning.features import kernels

    codes = torch.randint(256, (4, 3, 11), dtype=torch.uint8)
    codes[0, 0, :3] = torch.tensor([0, 128, 255])
    scales = torch.tensor([[1.5, -1.5, 0], [-2, 3, 0.1], [1e-3, 60000, -7], [1, -1, 2]])
    rows = torch.tensor([2, 0, 0, 3, 1])
    expected = dequantize_rows(codes, scales, rows, torch.float32)
    tensors = [tensor.to(device) for tensor in (codes, scales, rows)]
    for dtype, rtol in ((torch.float32, 1e-6), (torch.float16, 0), (torch.bfloat16, 2**-7)):  # may be truncated
        found = kernels.dequantize_rows(*tensors, dtype).cpu()
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected.to(dtype).float(), rtol=rtol, atol=1e-12)
    assert kernels.dequantize_rows(*tensors[:2], tensors[2][:0], torch.float32).shape == (0, 3, 11)


def run_in_interpreter(monkeypatch, sides):
    """Run in a process with TRITON_INTERPRET=1, where kernels run on a CPU."""
    for native_side, output_side in sides:
        with monkeypatch.context() as context:
            compare_in_interpreter(context, native_side, output_side)
    from captioning.features import kernels

    for block in (4, 16):  # several blocks per cell, and one
        monkeypatch.setattr(kernels, "MAX_BLOCK", block)
        check_dequantize("cpu")
    print("equal")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="is tested on the GPU instead")
def test_the_kernels_compute_what_their_plain_forms_do(times):
    sides = times([(2, 3), (3, 2)], [(2, 3), (3, 2), (8, 14), (18, 14)])  # N < P and N > P
    code = (
        "import pytest, tests.test_kernels as t\n"
        f"with pytest.MonkeyPatch.context() as m: t.run_in_interpreter(m, {sides})"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "equal\n"), run.stderr


@needs_triton
def test_rows_of_one_photo_have_adjacent_programs():
    """They find its keys and cells in the cache of the GPU."""
    from captioning.decoders import kernels

    decoder, grid, _ = make_attention()
    keys = grid.spread(decoder.key(grid.cells))
    fused = kernels.FusedAttention(grid.cells, keys, grid.pooling, decoder.score.weight, PHOTO)
    assert fused.row_order.tolist() == [1, 4, 0, 3, 2], "photo 0, photo 1, photo 2"


@needs_triton
def test_the_kernels_compile_without_a_gpu_and_keep_their_values_in_registers(times, capsys):
    """The compiler is stricter than the interpreter. A few bytes of spills buy one more resident program."""
    pytest.importorskip("triton", "3.4")
    compiler = bench("kernels")
    small = compiler.Bench(architectures=(90,), features=("bf16",), captions=25)
    full = (
        compiler.Bench((49, 64, 100, 196, fused_ops.MAX_CELLS), captions=25),
        compiler.Bench((64,), 1280, features=("bf16", "fp16"), captions=25),
    )
    for settings in times((small,), full):
        compiler.main(settings)
        resources, _ = capsys.readouterr().out.split("\n\n")
        names, _, *lines = [line.split(" | ") for line in resources.splitlines()]
        assert len(lines) > len(KERNELS)
        assert max(int(line[names.index("spills")]) for line in lines) <= 16, resources


@needs_triton
def test_rows_by_photo_need_a_smaller_cache():
    simulation = bench("kernels")
    settings = simulation.Bench(captions=50)
    photo_bytes = 2 * (196 * 512 + 64 * 2048)

    def read(megabytes, by_photo):
        cache = simulation.Cache(megabytes * 2**20)
        simulation.simulate_reads(settings, 64, cache, at_once=8, by_photo=by_photo)
        return cache.read_from_memory

    assert read(100, by_photo=False) == read(100, by_photo=True) == 10 * photo_bytes, "each photo once"
    assert read(1, by_photo=True) < 0.4 * read(1, by_photo=False)


class GpuCells:
    """What kernels_for asks of cells on a GPU."""

    device, dtype, requires_grad, shape = torch.device("cuda:0"), torch.float16, False, (3, 64, 2048)


def test_the_kernels_apply_to_features_on_a_gpu_that_need_no_gradient(monkeypatch):
    monkeypatch.setattr(fused_ops, "load_kernels", lambda module, device: LoadedKernels("kernels", None))
    cells = GpuCells()
    assert fused_ops.kernels_for(cells) == "kernels"
    with fused_ops.use_kernels(False):
        assert fused_ops.kernels_for(cells) is None
    assert fused_ops.kernels_for(cells) == "kernels"
    for name, value in (("requires_grad", True), ("dtype", torch.float64), ("shape", (3, 33 * 33, 2048))):
        with monkeypatch.context() as context:
            context.setattr(cells, name, value, raising=False)
            assert fused_ops.kernels_for(cells) is None
    assert fused_ops.kernels_for(cells) == "kernels"


def test_a_reason_is_given_where_the_kernels_do_not_apply(monkeypatch):
    assert fused_ops.kernels_unavailable(torch.device("cpu"), 64) == "the device is not an NVIDIA GPU"
    assert fused_ops.kernels_for(torch.zeros(1, 64, 8)) is None
    monkeypatch.setattr(fused_ops, "load_kernels", lambda module, device: LoadedKernels("kernels", None))
    gpu = GpuCells.device
    assert fused_ops.kernels_unavailable(gpu, 1024) is None
    assert fused_ops.kernels_unavailable(gpu, 1025) == (
        "they take at most 1024 cells per photo, and these features have 1025"
    )


@needs_triton
@pytest.mark.parametrize("module", ["captioning.decoders.kernels", "captioning.features.kernels"])
def test_kernels_that_do_not_compile_are_no_error(module, monkeypatch, capsys):
    def no_compiler(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(f"{module}.smoke_test", no_compiler)
    expected = LoadedKernels(None, "Triton does not work here: Failed to find C compiler")
    assert load_kernels(module, torch.device("cuda:99")) == expected
    assert capsys.readouterr().out == ""


def test_kernels_need_triton(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "captioning.decoders.kernels", raising=False)
    found = load_kernels("captioning.decoders.kernels", torch.device("cuda:98"))
    assert found == LoadedKernels(None, "triton is not installed")


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("native_side", [7, 8, 14, 28])
@pytest.mark.parametrize("precision, rtol, atol", [(torch.float32, 1e-3, 1e-5), (torch.bfloat16, 0.1, 0.03)])
def test_the_kernels_on_a_gpu_compute_what_the_plain_decoder_does(monkeypatch, precision, rtol, atol, native_side):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    decoder, grid, packed = make_attention("cuda", native_side)
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


@needs_gpu
def test_the_kernel_on_a_gpu_decodes_8_bit_features():
    check_dequantize("cuda")
