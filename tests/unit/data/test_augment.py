"""Augmentation against per-sample oracles in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elastic_kfac.data.augment import (
    augmentation_key,
    center_boxes,
    crop_flip,
    resized_crop_boxes,
)
from elastic_kfac.data.order import uniforms

KEY = augmentation_key(5, 2)


def test_crop_flip_every_sample_is_a_shift_with_optional_flip() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, size=(50, 2, 16, 12), dtype=np.uint8)
    ids = rng.permutation(1000)[:50]
    out = crop_flip(images, KEY, ids)
    draws = uniforms(KEY, ids, 3)
    border = 2
    for i in range(50):
        top, left = int(draws[i, 0] * 5), int(draws[i, 1] * 5)
        expected = np.zeros((2, 16, 12), np.uint8)
        for y in range(16):
            for x in range(12):
                source_y, source_x = y + top - border, x + left - border
                if 0 <= source_y < 16 and 0 <= source_x < 12:
                    expected[:, y, x] = images[i, :, source_y, source_x]
        if draws[i, 2] < 0.5:
            expected = expected[:, :, ::-1]
        assert np.array_equal(out[i], expected)
    assert {int(d * 5) for d in uniforms(KEY, np.arange(200), 3)[:, 0]} == {0, 1, 2, 3, 4}


def test_crop_flip_depends_on_the_id_and_not_on_the_place() -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(20, 1, 8, 8), dtype=np.uint8)
    ids = np.arange(100, 120)
    order = np.random.default_rng(1).permutation(20)
    whole = crop_flip(images, KEY, ids)
    assert np.array_equal(crop_flip(images[order], KEY, ids[order]), whole[order])
    assert not np.array_equal(crop_flip(images, augmentation_key(5, 3), ids), whole)


def reference_box(height: int, width: int, draws: np.ndarray) -> tuple[float, float, float, float]:
    """Random resized crop, one sample, as torchvision documents it."""
    for attempt in range(10):
        target = (0.08 + 0.92 * draws[attempt]) * height * width
        ratio = math.exp(math.log(3 / 4) + math.log(16 / 9) * draws[10 + attempt])
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = math.floor(draws[20] * (width - w + 1))
            top = math.floor(draws[21] * (height - h + 1))
            return left, top, left + w, top + h
    ratio = width / height
    if ratio < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif ratio > 4 / 3:
        w, h = round(height * 4 / 3), height
    else:
        w, h = width, height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def test_resized_crop_boxes_equal_one_by_one_reference() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 500, size=(400, 2))
    sizes[::10] = [[4, 400]]  # No draw fits: the fallback.
    sizes[5::10] = [[400, 4]]
    ids = rng.permutation(10_000)[:400]
    boxes, flips = resized_crop_boxes(sizes, KEY, ids)
    draws = uniforms(KEY, ids, 23)
    for i, (height, width) in enumerate(sizes.tolist()):
        assert tuple(boxes[i]) == reference_box(height, width, draws[i])
        assert flips[i] == (draws[i, 22] < 0.5)


def test_resized_crop_boxes_stay_inside_and_cover_the_range_of_areas() -> None:
    sizes = np.tile([[200, 300]], (5000, 1))
    boxes, flips = resized_crop_boxes(sizes, KEY, np.arange(5000))
    assert boxes[:, :2].min() >= 0
    assert boxes[:, 2].max() <= 300 and boxes[:, 3].max() <= 200
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    share = width * height / 60_000
    assert 0.075 < share.min() < 0.1
    assert share.max() == pytest.approx(200 * 267 / 60_000, abs=0.02)  # 4:3 in a 3:2 picture.
    assert (width / height).min() > 0.74 and (width / height).max() < 1.35
    assert flips.mean() == pytest.approx(0.5, abs=0.03)


def test_center_boxes_are_centred_squares() -> None:
    assert center_boxes(np.array([[80, 160], [64, 40]])).tolist() == [
        [45.0, 5.0, 115.0, 75.0],
        [2.5, 14.5, 37.5, 49.5],
    ]
