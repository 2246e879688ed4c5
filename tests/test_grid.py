"""The exact shortcut: everything linear in the 14x14 map can be computed from the native cells."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from captioning.encoders.grid import Grid, grid_pooling, native_indices, pooling_matrix


@given(st.integers(1, 20), st.integers(1, 20))
def test_pooling_matrix_is_adaptive_average_pooling(cells_in, cells_out):
    values = torch.randn(1, 3, cells_in, dtype=torch.float64)
    pooled = F.adaptive_avg_pool1d(values, cells_out)
    torch.testing.assert_close(values @ pooling_matrix(cells_in, cells_out).T, pooled, rtol=0, atol=1e-15)


def grid_and_map(height, width):
    torch.manual_seed(height)
    features = torch.randn(2, 5, height, width)
    grid = Grid(features.flatten(2).transpose(1, 2), grid_pooling(height, width))
    f14 = F.adaptive_avg_pool2d(features, 14).flatten(2).transpose(1, 2)  # (2, 196, 5)
    return grid, f14


@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (4, 4), (1, 1), (14, 14), (16, 16), (6, 9)])
def test_keys_context_and_mean_equal_those_of_the_pooled_map(shape):
    grid, f14 = grid_and_map(*shape)
    weight = torch.randn(5, 3)
    torch.testing.assert_close(grid.spread(grid.cells @ weight), f14 @ weight)
    attention = torch.rand(2, 4, 196).softmax(-1)
    torch.testing.assert_close(grid.attend(attention), attention @ f14)
    torch.testing.assert_close(grid.mean(), f14.mean(1))


def test_native_indices_are_those_of_the_design():
    assert native_indices(8) == [0, 2, 4, 6, 7, 9, 11, 13]
    assert native_indices(7) == [0, 2, 4, 6, 8, 10, 12]
    assert native_indices(14) == list(range(14))
    assert native_indices(10) is None and native_indices(12) is None


@pytest.mark.parametrize("side", [1, 2, 4, 5, 7, 8, 14])
def test_the_pooled_map_contains_the_native_cells_unchanged(side):
    indices = native_indices(side)
    features = torch.randn(1, 3, side, side)
    f14 = F.adaptive_avg_pool2d(features, 14)
    torch.testing.assert_close(f14[:, :, indices][..., indices], features)


def test_a_pooling_matrix_created_in_inference_mode_works_in_training():
    with torch.inference_mode():
        pooling = grid_pooling(9, 9)
    values = torch.randn(2, 81, 3, requires_grad=True)
    Grid(values, pooling).spread(values).sum().backward()
    assert values.grad is not None


def test_channels_are_dropped_in_all_cells_of_a_photo_and_the_mean_is_kept():
    grid = Grid(torch.rand(50, 4, 200, dtype=torch.float64) + 1, grid_pooling(2, 2).double())
    torch.manual_seed(0)
    dropped = grid.dropout_channels(0.25)
    ratio = dropped.cells / grid.cells
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert {round(value, 9) for value in ratio.flatten().tolist()} == {0, round(4 / 3, 9)}
    assert (ratio[:, 0] == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(ratio[0], ratio[1])
    torch.testing.assert_close(dropped.mean().mean(), grid.mean().mean(), rtol=0.02, atol=0)
    assert grid.dropout_channels(0.0) is grid
