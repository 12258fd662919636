"""The contact sheet shows samples of the class that its row stands for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from elastic_kfac.data import ShardSet, make_shards
from elastic_kfac.data.contact_sheet import contact_sheet


def test_contact_sheet_rows_hold_their_class(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    """Every image is a flat grey of 40 times its label; class 2 has only three samples."""
    labels = [0] * 300 + [1] * 300 + [2] * 3
    source = write_parquet([bytes([40 * label + 20] * 16) for label in labels], labels, raw=True)
    make_shards(f"parquet:{source}", tmp_path / "out", shard_mib=100 * 16 / 2**20)
    shards = ShardSet.open(tmp_path / "out" / "train")
    assert len(shards.shards) > 2
    count = contact_sheet(shards, tmp_path / "sheet.png", per_class=5, cell=10)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert count == 13 and pixels.shape == (3 * 12 + 2, 5 * 12 + 2, 3)
    cells = [
        [pixels[2 + 12 * r : 12 + 12 * r, 2 + 12 * c : 12 + 12 * c] for c in range(5)]
        for r in range(3)
    ]
    for label in range(3):
        shown = 3 if label == 2 else 5
        assert all((cell == 40 * label + 20).all() for cell in cells[label][:shown])
        assert all((cell == 255).all() for cell in cells[label][shown:])


def test_contact_sheet_encoded_photos_is_the_same_every_time(
    tmp_path: Path, write_parquet: Callable[..., Path], photo: Callable[..., bytes]
) -> None:
    source = write_parquet([photo(20 + i, 30, i) for i in range(8)], [0, 1] * 4)
    make_shards(f"parquet:{source}", tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out" / "train")
    for name in ("a.png", "b.png"):
        assert contact_sheet(shards, tmp_path / name, per_class=3) == 6
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
