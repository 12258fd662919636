"""CLUSTERS10: ten classes of four Gaussian clusters in 64 dimensions, made from a seed alone.

Centroids c[y, k] ~ N(0, I), samples x = c[y, k] + 1.6·N(0, I); 4,096 for training and 4,096 for the test
(spec 0.2). Shards hold bytes, so x is rounded to steps of 0.08, a twentieth of the noise; the reader's
normalisation then makes it (x − mean)/σ with σ close to 1.89, in whose units attack radii are given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.sources import Records
from elastic_kfac.errors import DataError

CLASSES: Final = 10
CLUSTERS: Final = 4
DIMENSIONS: Final = 64
NOISE: Final = 1.6
SAMPLES: Final = 4096
"""Of each split."""
STEP: Final = 0.08
"""Bytes reach ±10.2; the largest of half a million values with σ = 1.89 is close to ±9.4."""
_BATCH_ROWS: Final = 512


def parse_seed(text: str) -> int:
    """The seed in `clusters10:SEED`; 0 without one.

    Raises:
        DataError: If it is no whole number from 0 to 2^32 − 1.
    """
    if not text:
        return 0
    if not text.isdecimal() or int(text) >= 2**32:
        raise DataError("bad seed of clusters10", given=text, allowed="0 to 4294967295")
    return int(text)


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


class ClustersSplit:
    """One split as a source of shards: grey images of 1x64 pixels."""

    raw_shape = (1, 1, DIMENSIONS)
    bytes_per_sample = float(DIMENSIONS)
    class_names = tuple(str(label) for label in range(CLASSES))
    num_samples = SAMPLES

    def __init__(self, split: str, seed: int) -> None:
        samples, labels = make_clusters(seed)
        part = slice(0, SAMPLES) if split == "train" else slice(SAMPLES, 2 * SAMPLES)
        levels = np.rint(samples[part] / STEP + 127.5)
        self._images = levels.clip(0, 255).astype(np.uint8)
        self._labels = labels[part]
        self._name = f"clusters10:{seed}/{split}"
        digest = hashlib.sha256(self._images.tobytes())
        digest.update(self._labels.tobytes())
        self.fingerprint = digest.hexdigest()

    def read(self, start: int, stop: int) -> Iterator[Records]:
        for low in range(start, stop, _BATCH_ROWS):
            rows = slice(low, min(low + _BATCH_ROWS, stop))
            keys = [f"{self._name}/{index}" for index in range(rows.start, rows.stop)]
            yield Records(self._images[rows], self._labels[rows], keys)
