"""Small data sets that need no files: scikit-learn's digits and CLUSTERS10.

CLUSTERS10 has ten classes of four Gaussian clusters in 64 dimensions: centroids c[y, k] ~ N(0, I),
samples x = c[y, k] + 1.6·N(0, I), 4,096 per split. Shards hold bytes, so x is rounded to steps of
0.08, a twentieth of the noise; the reader's normalisation then gives (x − mean)/σ with σ close to
1.89, the unit of attack radii.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache, partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.order import SOURCE_SHUFFLE, permutation, stream_key
from elastic_kfac.data.sources.source import ColumnSplit, Source, image_split
from elastic_kfac.errors import DataError

CLASSES: Final = 10
CLUSTERS: Final = 4
DIMENSIONS: Final = 64
NOISE: Final = 1.6
SAMPLES: Final = 4096
"""Per split of CLUSTERS10."""
STEP: Final = 0.08
"""Bytes reach ±10.2; the largest of half a million values with σ = 1.89 is close to ±9.4."""
_CLASS_NAMES: Final = tuple(str(label) for label in range(10))


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; a fixed stratified fifth is the test split."""
    return Source("digits", {split: partial(_digits, split) for split in ("train", "test")})


def _digits(split: str) -> ColumnSplit:
    images, labels = _all_digits()
    order = _order(split, labels)
    return image_split(
        load=images.__getitem__,
        key="digits/{}".format,
        labels=labels,
        order=order,
        class_names=_CLASS_NAMES,
        bytes_per_sample=64.0,
        fingerprint=_fingerprint(images[order], labels[order]),
        raw_shape=(1, 8, 8),
    )


def digit_images(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures [n, 8, 8] and labels of a split of `digits`."""
    images, labels = _all_digits()
    order = _order(split, labels)
    return images[order].reshape(-1, 8, 8), labels[order]


def _all_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Values are 0..16; 255/16 keeps their ratios and uses the whole byte.
    images = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8).reshape(-1, 64)
    return images, bunch.target.astype(np.int64)


def _order(split: str, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    chosen = []
    for digit in range(10):
        members = permutation(stream_key(SOURCE_SHUFFLE, digit), np.flatnonzero(labels == digit))
        cut = round(len(members) / 5)
        chosen.append(members[:cut] if split == "test" else members[cut:])
    return permutation(stream_key(SOURCE_SHUFFLE), np.concatenate(chosen))


def clusters10(seed: str) -> Source:
    """CLUSTERS10 of a seed (0 if empty), as grey images of 1x64 pixels.

    Raises:
        DataError: If the seed is not an integer from 0 to 2^32 − 1.
    """
    if seed and not (seed.isdecimal() and int(seed) < 2**32):
        raise DataError("bad seed of clusters10", given=seed, allowed="0 to 4294967295")
    name = f"clusters10:{int(seed or 0)}"
    splits = ("train", "test")
    return Source(name, {split: partial(_clusters, split, int(seed or 0)) for split in splits})


def _clusters(split: str, seed: int) -> ColumnSplit:
    samples, labels = make_clusters(seed)
    part = slice(0, SAMPLES) if split == "train" else slice(SAMPLES, 2 * SAMPLES)
    images = np.rint(samples[part] / STEP + 127.5).clip(0, 255).astype(np.uint8)
    return image_split(
        load=images.__getitem__,
        key=f"clusters10:{seed}/{split}/{{}}".format,
        labels=labels[part],
        order=np.arange(SAMPLES),
        class_names=_CLASS_NAMES,
        bytes_per_sample=float(DIMENSIONS),
        fingerprint=_fingerprint(images, labels[part]),
        raw_shape=(1, 1, DIMENSIONS),
    )


@lru_cache(maxsize=2)
def make_clusters(seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Samples [2 · SAMPLES, DIMENSIONS] and labels, the training split first."""
    # The legacy generator's streams are frozen; those of the newer ones may change with numpy.
    random = np.random.RandomState(seed)
    centroids = random.standard_normal((CLASSES, CLUSTERS, DIMENSIONS))
    labels = random.randint(0, CLASSES, 2 * SAMPLES)
    clusters = random.randint(0, CLUSTERS, 2 * SAMPLES)
    noise = random.standard_normal((2 * SAMPLES, DIMENSIONS))
    return centroids[labels, clusters] + NOISE * noise, labels.astype(np.int64)


def _fingerprint(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(images.tobytes())
    digest.update(labels.tobytes())
    return digest.hexdigest()
