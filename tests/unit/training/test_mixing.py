"""Mixup recursions on scalars, Beta moments, erased areas, and independence of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.mixing import Mixup, RandomErasing, mixing_weights

IDS = np.arange(60_000)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 0.6, 1.0])
def test_weights_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    weights = mixing_weights(alpha, seed=1, epoch=2, ids=IDS, fold=False)
    assert weights.min() >= 0 and weights.max() <= 1
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = 3 * variance**2 * (2 * alpha + 1) / (2 * alpha + 3)  # of a symmetric Beta
    error = np.sqrt(variance / len(IDS))
    assert abs(weights.mean() - 0.5) < 5 * error
    spread = np.sqrt((fourth - variance**2) / len(IDS))
    assert abs(((weights - 0.5) ** 2).mean() - variance) < 5 * spread
    folded = mixing_weights(alpha, seed=1, epoch=2, ids=IDS)
    assert np.array_equal(folded, np.maximum(weights, 1 - weights))


def test_weights_of_alpha_one_are_uniform() -> None:
    weights = mixing_weights(1.0, seed=3, epoch=0, ids=IDS, fold=False)
    quantiles = np.quantile(weights, [0.1, 0.25, 0.5, 0.75, 0.9])
    assert quantiles == pytest.approx([0.1, 0.25, 0.5, 0.75, 0.9], abs=0.01)


def test_weights_belong_to_seed_epoch_and_sample() -> None:
    whole = mixing_weights(0.4, seed=1, epoch=2, ids=np.arange(10))
    parts = [mixing_weights(0.4, seed=1, epoch=2, ids=ids) for ids in ([7, 8, 9], [0, 1])]
    assert np.array_equal(np.concatenate(parts), whole[[7, 8, 9, 0, 1]])
    for changed in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not np.array_equal(mixing_weights(0.4, ids=np.arange(10), **changed), whole)


@pytest.mark.parametrize("running", [True, False])
def test_recursion_on_scalars(running: bool) -> None:
    mixup = Mixup(0.6, 2, seed=9, running=running)
    torch.manual_seed(0)
    previous_x = previous_y = None
    for step in range(6):
        ids = np.arange(4) + 4 * step
        x = torch.randn(4, 1, 1, 1, dtype=torch.float64)
        labels = torch.randint(0, 2, (4,))
        y = F.one_hot(labels, 2).double()
        mixed_x, mixed_y = mixup(x, labels, ids, epoch=3)
        expected_x, expected_y = x, y
        if previous_x is not None:
            share = torch.from_numpy(mixing_weights(0.6, seed=9, epoch=3, ids=ids)).view(4, 1)
            expected_x = (share * x.view(4, 1) + (1 - share) * previous_x.view(4, 1)).view_as(x)
            expected_y = share * y + (1 - share) * previous_y
        torch.testing.assert_close(mixed_x, expected_x, rtol=0, atol=1e-15)
        torch.testing.assert_close(mixed_y, expected_y, rtol=0, atol=1e-15)
        previous_x, previous_y = (expected_x, expected_y) if running else (x, y)


def test_label_probabilities_stay_probabilities_and_fit_the_loss() -> None:
    mixup = Mixup(0.4, 3, seed=0)
    for step in range(5):
        images = torch.randn(6, 1, 2, 2)
        _, targets = mixup(images, torch.randint(0, 3, (6,)), np.arange(6) + step, epoch=0)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        F.cross_entropy(torch.randn(6, 3), targets, reduction="sum")


def batch(size: int, value: float) -> tuple[torch.Tensor, torch.Tensor, np.ndarray[Any, Any]]:
    return torch.full((size, 1, 2, 2), value), torch.zeros(size).long(), np.arange(size)


def test_buffer_that_does_not_fit_is_reset_or_subsampled() -> None:
    reset, subsample = Mixup(1.0, 2, seed=0), Mixup(1.0, 2, seed=0, on_smaller="subsample")
    for mixup in (reset, subsample):
        mixup(*batch(4, 1.0), epoch=0)
    assert torch.equal(reset(*batch(3, 0.0), epoch=0)[0], torch.zeros(3, 1, 2, 2))
    assert bool((subsample(*batch(3, 0.0), epoch=0)[0] > 0).all())
    for mixup in (reset, subsample):  # a larger batch never fits
        assert torch.equal(mixup(*batch(5, 0.0), epoch=0)[0], torch.zeros(5, 1, 2, 2))
    assert bool((reset(*batch(5, 1.0), epoch=0)[0] < 1).all())
    reset.drop()  # what a resize does
    assert torch.equal(reset(*batch(5, 7.0), epoch=0)[0], torch.full((5, 1, 2, 2), 7.0))


def test_what_happens_to_a_mixed_batch_does_not_reach_the_buffer() -> None:
    first, second = Mixup(1.0, 2, seed=0), Mixup(1.0, 2, seed=0)
    images, _ = first(*batch(4, 1.0), epoch=0)
    images.zero_()
    second(*batch(4, 1.0), epoch=0)
    assert torch.equal(first(*batch(4, 2.0), epoch=0)[0], second(*batch(4, 2.0), epoch=0)[0])


def test_erased_areas_have_the_statistics_of_the_recipe() -> None:
    erasing = RandomErasing(seed=4)
    ids = IDS[:50_000]
    boxes = erasing.boxes(224, 224, ids, epoch=1)
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    erased = heights > 0
    assert erased.mean() == pytest.approx(0.5, abs=0.01)
    shares = (heights * widths)[erased] / 224**2
    assert shares.mean() == pytest.approx(0.135, abs=0.002)
    assert shares.std() == pytest.approx(0.23 / np.sqrt(12), rel=0.02)
    assert shares.min() > 0.018 and shares.max() < 0.256
    ratios = (heights / np.maximum(widths, 1))[erased]
    assert (ratios < 1).mean() == pytest.approx(0.5, abs=0.02)
    low = np.minimum(ratios, 1 / ratios)
    assert low.min() > 0.28 and low.mean() == pytest.approx(0.65, abs=0.01)
    assert boxes.min() >= 0 and boxes.max() <= 224
    # Every pixel can be erased, at every border.
    assert boxes[erased][:, :2].min() == 0 and boxes[:, 2:].max() == 224


def test_erasing_fills_exactly_the_boxes_of_a_copy() -> None:
    erasing = RandomErasing(seed=4, probability=0.9, fill=-1.0)
    images = torch.rand(20, 3, 9, 14)
    before = images.clone()
    erased = erasing(images, np.arange(20), epoch=0)
    assert torch.equal(images, before)
    boxes = erasing.boxes(9, 14, np.arange(20), epoch=0)
    for index, (top, left, bottom, right) in enumerate(boxes.tolist()):
        before[index, :, top:bottom, left:right] = -1.0
    assert torch.equal(erased, before)
    assert (boxes[:, 2] > 0).any() and not (boxes[:, 2] > 0).all()


def test_erasing_belongs_to_seed_epoch_and_sample() -> None:
    erasing = RandomErasing(seed=4)
    images = torch.rand(12, 1, 8, 8)
    whole = erasing(images, np.arange(12), epoch=3)
    parts = [erasing(images[i : i + 5], np.arange(12)[i : i + 5], epoch=3) for i in (0, 5, 10)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(erasing(images, np.arange(12), epoch=4), whole)


def test_bad_values_say_what_is_allowed() -> None:
    for alpha in (0.0, 1.5):
        with pytest.raises(ConfigError, match="alpha"):
            Mixup(alpha, 2, seed=0)
    with pytest.raises(ConfigError, match="reset, subsample"):
        Mixup(0.4, 2, seed=0, on_smaller="broadcast")  # type: ignore[arg-type]
    for bad in ({"probability": 1.5}, {"area": (0.5, 0.2)}, {"aspect": (0.0, 1.0)}):
        with pytest.raises(ConfigError, match="out of range"):
            RandomErasing(seed=0, **bad)  # type: ignore[arg-type]
