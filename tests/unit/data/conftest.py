"""Small shard sets that the tests of this room share."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from elastic_kfac.data import ShardSet, make_shards


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of the digits in shards of 512 rows; not to be changed by a test."""
    root = tmp_path_factory.mktemp("digits")
    make_shards("digits", root, shard_mib=512 * 64 / 2**20)
    return root


@pytest.fixture
def digits_train(digits: Path) -> ShardSet:
    return ShardSet.open(digits / "train")


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Writes a source Parquet file of raw or encoded images; returns its path."""

    def write(
        images: list[bytes],
        labels: list[int],
        *,
        name: str = "set_train.parquet",
        raw: bool = False,
        metadata: dict[str, str] | None = None,
    ) -> Path:
        kind = pa.binary(len(images[0])) if raw else pa.binary()
        table = pa.table({"image": pa.array(images, kind), "label": pa.array(labels, pa.int64())})
        path = tmp_path / name
        pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=100)
        return path

    return write


@pytest.fixture
def photo() -> Callable[..., bytes]:
    """A smooth JPEG or PNG of a given size; `seed` changes its colours."""

    def draw(height: int, width: int, seed: int = 0, kind: str = "JPEG") -> bytes:
        rng = np.random.default_rng(seed)
        corners = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
        out = io.BytesIO()
        image.save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
        return out.getvalue()

    return draw
