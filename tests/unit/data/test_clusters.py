"""CLUSTERS10: what the samples are, that they depend on the seed alone, and what bytes do to them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from elastic_kfac.data.manifest import ShardSet
from elastic_kfac.data.shards import make_shards
from elastic_kfac.data.sources import Records, SourceSplit, open_source
from elastic_kfac.data.sources.generated import NOISE, SAMPLES, STEP, make_clusters
from elastic_kfac.errors import DataError

GOLDEN = "2b42ade055a90089"
"""Of the training split of seed 0."""


def test_samples_are_four_clusters_per_class_with_the_given_noise() -> None:
    samples, labels = make_clusters(0)
    assert samples.shape == (2 * SAMPLES, 64) and set(labels.tolist()) == set(range(10))
    for label in (0, 7):
        values = np.linalg.eigvalsh(np.cov(samples[labels == label].T))[::-1]
        # Four centroids span three directions with variance 64/4 each; the rest is noise.
        assert values[2] > 8 and values[3] < 5
        assert np.median(values) == pytest.approx(NOISE**2, rel=0.1)


def test_same_seed_gives_the_same_bytes_on_every_machine() -> None:
    digest = hashlib.sha256(_pixels("train", 0).tobytes())
    assert digest.hexdigest()[:16] == GOLDEN
    assert _split("train", 0).fingerprint == _split("train", 0).fingerprint
    prints = {_split(split, seed).fingerprint for split in ("train", "test") for seed in (0, 1)}
    assert len(prints) == 4


def test_bytes_keep_the_samples_to_half_a_step() -> None:
    samples, labels = make_clusters(0)
    read = _pixels("test", 0)
    assert np.abs((read - 127.5) * STEP - samples[SAMPLES:]).max() <= STEP / 2 + 1e-9
    assert [int(label) for r in _records("test", 0) for label in r.values["label"]] == labels[
        SAMPLES:
    ].tolist()


def test_shards_have_both_splits_and_their_statistics(tmp_path: Path) -> None:
    make_shards("clusters10", str(tmp_path))
    train = ShardSet.open(f"{tmp_path}/train")
    assert (train.num_samples, train.num_classes, train.image.shape) == (SAMPLES, 10, (1, 1, 64))
    assert train.image.std[0] * 255 * STEP == pytest.approx(
        np.std(make_clusters(0)[0][:SAMPLES]), rel=1e-3
    )
    assert ShardSet.open(f"{tmp_path}/test").num_samples == SAMPLES


@pytest.mark.parametrize("text", ["clusters10:x", "clusters10:-1", f"clusters10:{2**32}"])
def test_bad_seed_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="bad seed of clusters10"):
        open_source(text)


def _records(split: str, seed: int) -> list[Records]:
    return list(_split(split, seed).read(0, SAMPLES))


def _pixels(split: str, seed: int) -> NDArray[np.uint8]:
    return np.concatenate([np.asarray(record.values["image"]) for record in _records(split, seed)])


def _split(split: str, seed: int) -> SourceSplit:
    return open_source(f"clusters10:{seed}").split(split)
