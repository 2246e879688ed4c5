"""Feature maps as 8-bit codes: how far they are off, in memory and in a file."""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from captioning.decoders.factory import build_decoder
from captioning.encoders.grid import Grid, grid_pooling
from captioning.errors import UserError
from captioning.features import hdf5_layout
from captioning.features.cached_grid import FeatureRows
from captioning.features.feature_files import open_feature_files
from captioning.features.feature_placement import FeaturePlacement, FileRows, PlacedFeatures
from captioning.features.feature_reader import FeatureReader
from captioning.features.feature_writer import FeatureWriter, to_stored_rows
from captioning.features.quantization import dequantize, dequantize_rows, proven_kernel, quantize
from captioning.runtime.kernel_loading import LoadedKernels
from tests.test_decoders import SIZES
from tests.test_feature_cache import IDS, attributes, write

CPU = torch.device("cpu")


def features(seed, signed, cells=(5, 64), channels=256):
    """Maps like those after a ReLU: many zeros, many small values, a few large ones; or signed ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*cells, channels, generator=generator) * torch.rand(*cells, 1, generator=generator).exp()
    return values if signed else values.clamp_min(0) ** 2


def relative_error(approximate, exact):
    """Of each cell (...): |approximate - exact| / |exact|, in the L2 norm."""
    return (approximate - exact).norm(dim=-1) / exact.norm(dim=-1)


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([1e-6, 1.0, 1e4]))
def test_a_cell_is_off_by_less_than_one_percent_whatever_its_scale(seed, signed, magnitude):
    exact = features(seed, signed) * magnitude
    codes, scales = quantize(exact)
    assert codes.dtype == torch.uint8 and scales.dtype == torch.float32
    error = relative_error(dequantize(codes, scales, torch.float32), exact)
    assert error.max() < (0.012 if signed else 0.006) and (scales < 0).all() == signed


def test_each_value_is_rounded_to_the_nearest_code_in_its_square_root():
    """By brute force over all codes."""
    for signed in (False, True):
        exact = features(0, signed, cells=(3,)).double()
        codes, scales = quantize(exact)
        every_code = torch.arange(256, dtype=torch.uint8).expand(3, 256)
        values = dequantize(every_code[:, 1:] if signed else every_code, scales, torch.float64)  # (3, K); 0 is unused
        distances = (values.sign() * values.abs().sqrt())[:, None] - (exact.sign() * exact.abs().sqrt())[..., None]
        assert torch.equal(codes.long() - int(signed), distances.abs().argmin(-1))


def test_zero_stays_zero_and_the_largest_value_is_kept():
    exact = torch.tensor([[0, 0, 0, 0], [0, 3, 1, 0], [0, -3, 1, 0], [-1e-30, 0, 2, 0]], dtype=torch.float32)
    result = dequantize(*quantize(exact), torch.float32)
    assert torch.equal(result == 0, exact.abs() < 1e-20)
    torch.testing.assert_close(result.amax(1), exact.amax(1), rtol=1e-2, atol=0)
    torch.testing.assert_close(result.abs().amax(1), exact.abs().amax(1), rtol=1e-6, atol=0)


def test_values_that_are_not_finite_are_seen_in_the_scales():
    cells = torch.ones(3, 4)
    cells[0, 1], cells[1, 2] = torch.nan, -torch.inf
    assert quantize(cells)[1].isfinite().tolist() == [False, False, True]


def test_codes_of_codes_do_not_drift():
    """Features that were stored as codes and are read, are quantised to the same codes again."""
    codes, scales = quantize(features(1, signed=False))
    again = quantize(dequantize(codes, scales, torch.float32))
    assert torch.equal(again[0], codes) and torch.allclose(again[1], scales, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_dequantised_in_any_order(dtype):
    codes, scales = quantize(torch.cat([features(2, signed=True), features(3, signed=False)]))
    rows = torch.tensor([7, 0, 9, 0, 3])
    result = dequantize_rows(codes, scales, rows, dtype)
    assert result.dtype == dtype and torch.equal(result, dequantize(codes, scales, dtype)[rows])


def wrong(error):
    """A kernel whose values are all off by this much."""
    return lambda codes, scales, rows, dtype: dequantize_rows(codes, scales, rows, dtype) * (1 + error)


class CompilationError(Exception):
    """Derives from Exception alone, as Triton's own."""


def broken(codes, scales, rows, dtype):
    raise CompilationError("an illegal instruction. More text")


@pytest.mark.parametrize(
    "kernel, problem",
    [
        (wrong(0), None),
        (wrong(0.03), "it is off by 3.00%"),
        (wrong(torch.nan), "it is off by nan%"),
        (broken, "an illegal instruction"),
        (None, "Triton is not installed"),
    ],
)
def test_a_kernel_is_used_only_if_it_computes_what_plain_pytorch_does(kernel, problem, capsys):
    module = kernel and SimpleNamespace(dequantize_rows=kernel)
    codes, scales = quantize(features(2, signed=True))
    used = proven_kernel(LoadedKernels(module, None if module else problem), codes, scales)
    assert used is (dequantize_rows if problem else kernel)
    printed = capsys.readouterr().out
    assert printed == (
        f"8-bit features are decoded without their GPU kernel, which is slower: {problem}\n" if problem else ""
    )


def test_gradients_of_a_decoder_hardly_change():
    torch.manual_seed(0)
    words = pack_padded_sequence(torch.randint(4, 11, (5, 7)), torch.tensor([7, 5, 5, 3, 1]), batch_first=True)
    targets = torch.randint(4, 11, words.data.shape)
    photo_index = torch.tensor([1, 0, 2, 1, 0])
    decoder = build_decoder("attention", SIZES).eval()
    exact = features(4, signed=False, cells=(3, 64), channels=SIZES["channels"])
    gradients = []
    for cells in (exact, dequantize(*quantize(exact), torch.float32)):
        decoder.zero_grad()
        logits = decoder(Grid(cells, grid_pooling(8, 8)), words, photo_index).logits
        F.cross_entropy(logits, targets).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in decoder.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < 0.01


# ---- files


@pytest.mark.parametrize("grid", ["14", "native"])
def test_a_file_of_codes_holds_the_quantised_cells_and_the_exact_means(tmp_path, grid):
    exact = features(5, signed=True, cells=(10, 64), channels=6)
    photos = Grid(exact, grid_pooling(8, 8))
    side = 14 if grid == "14" else 8
    writer = FeatureWriter(tmp_path / "f.h5", IDS, attributes((8, 8), grid), 6, "uint8", overwrite=False)
    writer.write(np.arange(10), *to_stored_rows(photos, (side, side, 6), "uint8"))
    writer.close()
    reader = FeatureReader(tmp_path / "f.h5")
    codes, scales = quantize(exact)
    held = reader.read_rows(np.array([7, 2]))
    assert torch.equal(held.cells, codes[[7, 2]]) and torch.equal(held.scales, scales[[7, 2]]), "the native cells alone"
    assert torch.equal(reader.read(np.array([7, 2])).cells, dequantize(codes, scales, torch.float32)[[7, 2]])
    torch.testing.assert_close(reader.read_pooled(np.arange(10)).cells[:, 0], photos.mean())
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["features"].shape == (10, side, side, 6) and file["features"].dtype == np.uint8
        assert file["scales"].shape == (10, side, side) and file["scales"].dtype == np.float32
        assert file.attrs["quantization"].decode() == hdf5_layout.QUANTIZATION


def test_codes_stay_codes_wherever_they_are_held(tmp_path):
    write(tmp_path / "f.h5", dtype="uint8")
    source = FileRows(open_feature_files([tmp_path / "f.h5"], tmp_path), pooled=False, quantize=False)
    held = PlacedFeatures(source, np.arange(10), FeaturePlacement(10, 5, 5, ""), CPU)
    for rows in (held.resident.held, held.host.held):
        assert isinstance(rows, FeatureRows) and rows.cells.dtype == torch.uint8 and rows.row_bytes == 64 * (6 + 4)


def test_a_file_of_codes_is_half_as_large_and_float_files_have_no_scales(tmp_path):
    for dtype in ("float16", "uint8"):
        FeatureWriter(tmp_path / f"{dtype}.h5", IDS, attributes(), 2048, dtype, overwrite=False).close()
    half, codes = ((tmp_path / f"{dtype}.h5").stat().st_size for dtype in ("float16", "uint8"))
    assert codes < 0.52 * half
    with h5py.File(tmp_path / "float16.h5") as file:
        assert "scales" not in file and "quantization" not in file.attrs


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: file.attrs.modify("quantization", b"another"), "uint8 codes of quantization 'another'"),
        (lambda file: file.__delitem__("scales"), "no array scales"),
    ],
)
def test_codes_without_their_scales_or_of_another_kind_are_refused(tmp_path, damage, message):
    write(tmp_path / "f.h5", dtype="uint8")
    with h5py.File(tmp_path / "f.h5", "r+") as file:
        damage(file)
    with pytest.raises(UserError, match=f"cannot be read as a Kantu feature file.*{message}"):
        FeatureReader(tmp_path / "f.h5")


def test_a_version_without_codes_refuses_the_file_with_a_line(tmp_path, monkeypatch):
    write(tmp_path / "f.h5", dtype="uint8")
    monkeypatch.setitem(hdf5_layout.DTYPES, "features", ("float16", "float32"))
    with pytest.raises(UserError, match="features is not a contiguous array of float16 or float32"):
        FeatureReader(tmp_path / "f.h5")


def test_features_that_are_not_finite_are_refused_before_they_are_written(tmp_path):
    writer = FeatureWriter(tmp_path / "f.h5", IDS, attributes(), 6, "uint8", overwrite=False)
    cells = torch.ones(1, 64, 6)
    cells[0, 9, 2] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        writer.write(np.array([0]), *to_stored_rows(Grid(cells, grid_pooling(8, 8)), (14, 14, 6), "uint8"))
    writer.close()
    assert not FeatureReader(tmp_path / "f.h5").done().any()
