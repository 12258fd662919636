"""Patch Gram matrices from autocorrelations, against windows cut out of the padded input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from elastic_kfac.curvature import autocorrelation
from elastic_kfac.curvature.autocorrelation import autocorrelation_gram

GEOMETRIES = [
    # kernel, padding, image
    ((3, 3), (1, 1), (8, 8)),
    ((3, 3), (1, 1), (7, 10)),
    ((3, 3), (2, 1), (6, 9)),
    ((5, 5), (2, 2), (10, 11)),
    ((5, 5), (4, 3), (10, 10)),
    ((7, 3), (3, 1), (14, 6)),
    ((2, 4), (1, 2), (5, 8)),
    ((1, 3), (0, 1), (4, 6)),
    ((3, 1), (1, 0), (6, 3)),
]


def windows_gram(x: Tensor, kernel: Sequence[int], padding: Sequence[int]) -> Tensor:
    padded = torch.nn.functional.pad(x, [p for one in reversed(padding) for p in (one, one)])
    for axis, k in enumerate(kernel, start=2):
        padded = padded.unfold(axis, k, 1)
    dims = len(kernel)
    rows = padded.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    rows = rows.reshape(-1, x.shape[1] * math.prod(kernel))
    return rows.T @ rows


@pytest.mark.parametrize("by_fourier", [True, False])
@pytest.mark.parametrize(("kernel", "padding", "image"), GEOMETRIES)
def test_both_ways_equal_windows(
    kernel: tuple[int, int],
    padding: tuple[int, int],
    image: tuple[int, int],
    by_fourier: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autocorrelation, "_prefers_fourier", lambda *_: by_fourier)
    torch.manual_seed(0)
    x = torch.randn(3, 4, *image, dtype=torch.double)
    found = autocorrelation_gram(x, kernel, padding)
    torch.testing.assert_close(found, windows_gram(x, kernel, padding), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("kernel", "padding", "image"), GEOMETRIES)
def test_an_empty_batch_adds_nothing(
    kernel: tuple[int, int], padding: tuple[int, int], image: tuple[int, int]
) -> None:
    found = autocorrelation_gram(torch.empty(0, 4, *image), kernel, padding)
    assert found.shape == (4 * math.prod(kernel),) * 2 and not found.any()


@pytest.mark.parametrize("pieces", [1, 500, 1 << 20])
def test_pieces_of_any_size_give_the_same(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocorrelation, "_prefers_fourier", lambda *_: True)
    monkeypatch.setattr(autocorrelation, "_PIECE", pieces)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 9, 8, dtype=torch.double)
    found = autocorrelation_gram(x, (3, 3), (1, 1))
    torch.testing.assert_close(found, windows_gram(x, (3, 3), (1, 1)), rtol=1e-11, atol=1e-11)


def test_large_batches_take_the_frequencies_and_single_large_images_do_not() -> None:
    lags = (range(3), range(-2, 3))
    taken = [
        autocorrelation._prefers_fourier(torch.empty(shape, device=device), lags)
        for shape, device in (
            ((64, 16, 32, 32), "cpu"),
            ((64, 64, 8, 8), "cpu"),
            ((64, 64, 8, 8), "meta"),
            ((2, 8, 224, 224), "cpu"),
            ((1, 64, 112, 112), "cpu"),
        )
    ]
    assert taken == [True, True, False, False, False]


def test_single_precision_is_enough() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16, 16, 16).relu() + 1  # a mean
    assert autocorrelation._prefers_fourier(x, (range(3), range(-2, 3)))
    exact = windows_gram(x.double(), (3, 3), (1, 1))
    error = (autocorrelation_gram(x, (3, 3), (1, 1)).double() - exact).abs().max()
    assert error <= 1e-5 * exact.abs().max()


def test_a_dead_channel_stays_exactly_zero_and_one_that_is_not_finite_shows() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16, 8, 8)
    x[:, 3] = 0
    found = autocorrelation_gram(x, (3, 3), (1, 1)).view(16, 9, 16, 9)
    assert not found[3].any() and not found[:, :, 3].any()
    x[5, 7, 2, 2] = float("inf")
    diagonal = autocorrelation_gram(x, (3, 3), (1, 1)).diagonal().view(16, 9)
    assert not torch.isfinite(diagonal[7]).any()
