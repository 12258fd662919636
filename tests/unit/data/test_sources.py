"""Sources: Parquet in its forms, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic_kfac.data import ShardSet, make_shards
from elastic_kfac.data.sources import open_source
from elastic_kfac.errors import DataError


def pixels_of(root: Path, split: str = "train") -> list[bytes]:
    shards = sorted((root / split).glob("shard-*.parquet"))
    return [image for s in shards for image in pq.read_table(s).column("image").to_pylist()]


@pytest.mark.parametrize(
    "text", ["numbers", "digits:x", "parquet:", "csv:/data/x.csv", "", "imagenet:/x"]
)
def test_source_unknown_raises_with_what_is_allowed(text: str) -> None:
    with pytest.raises(
        DataError, match=r"unknown data source.*digits, clusters10\[:SEED\],.*parquet:PATH"
    ):
        open_source(text)


def test_source_missing_parquet_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Parquet files"):
        open_source(f"parquet:{tmp_path / 'nothing'}")


def test_source_not_parquet_raises(tmp_path: Path) -> None:
    path = tmp_path / "x_train.parquet"
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        make_shards(f"parquet:{path}", tmp_path / "out")


def test_source_unknown_split_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such split.*valid.*train, test"):
        make_shards("digits", tmp_path, "valid")


def test_parquet_prefix_and_folder_find_both_splits(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    images = [bytes([i] * 9) for i in range(30)]
    write_parquet(images, [i % 3 for i in range(30)], raw=True, name="set_train.parquet")
    write_parquet(images[:6], [i % 3 for i in range(6)], raw=True, name="set_test.parquet")
    for text in (f"parquet:{tmp_path}", f"parquet:{tmp_path / 'set'}"):
        assert sorted(open_source(text).openers) == ["test", "train"]
    write_parquet(images, [0] * 30, raw=True, name="other_train.parquet")
    with pytest.raises(DataError, match=r"several data sets.*other.*set"):
        open_source(f"parquet:{tmp_path}")
    assert sorted(open_source(f"parquet:{tmp_path / 'set'}").openers) == ["test", "train"]


def test_parquet_raw_rows_keep_order_and_pixels_across_row_groups(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, 16, dtype=np.uint8).tobytes() for _ in range(1234)]
    labels = rng.integers(0, 7, 1234).tolist()
    source = write_parquet(images, labels, raw=True)
    make_shards(f"parquet:{source}", tmp_path / "out", shard_mib=600 * 16 / 2**20)
    assert pixels_of(tmp_path / "out") == images
    shards = ShardSet.open(tmp_path / "out" / "train")
    assert shards.shard_rows == (512, 512, 210)
    assert shards.image.shape == (1, 4, 4)
    assert shards.class_counts == tuple(np.bincount(labels).tolist())


def test_parquet_raw_colour_is_stored_planar(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    metadata = {"height": "2", "width": "2", "channels": "3", "layout": "HWC"}
    source = write_parquet([image.tobytes()], [0], raw=True, metadata=metadata)
    make_shards(f"parquet:{source}", tmp_path / "out")
    assert pixels_of(tmp_path / "out") == [image.transpose(2, 0, 1).tobytes()]
    assert ShardSet.open(tmp_path / "out" / "train").image.shape == (3, 2, 2)


def test_parquet_raw_unknown_shape_raises(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    source = write_parquet([bytes(7)], [0], raw=True)
    with pytest.raises(DataError, match=r"image shape.*7 bytes"):
        make_shards(f"parquet:{source}", tmp_path / "out")


def test_parquet_class_names_come_from_metadata(
    tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    metadata = {"class_names": '["cat", "dog", "eel"]'}
    source = write_parquet([bytes(4)] * 2, [0, 1], raw=True, metadata=metadata)
    make_shards(f"parquet:{source}", tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out" / "train")
    assert shards.class_names == ("cat", "dog", "eel") and shards.class_counts == (1, 1, 0)


@pytest.mark.parametrize("label", [3, -1])
def test_parquet_label_out_of_range_raises(
    tmp_path: Path, write_parquet: Callable[..., Path], label: int
) -> None:
    metadata = {"class_names": '["cat", "dog", "eel"]'}
    source = write_parquet([bytes(4)] * 3, [0, label, 1], raw=True, metadata=metadata)
    with pytest.raises(DataError, match=rf"label out of range.*record 1.*given: {label}"):
        make_shards(f"parquet:{source}", tmp_path / "out")


def test_parquet_missing_column_raises(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"picture": [b"a"], "label": [1]}), path)
    with pytest.raises(DataError, match=r"no image column.*picture"):
        make_shards(f"parquet:{path}", tmp_path / "out")


@pytest.mark.parametrize(
    ("bad", "reason"), [(b"", "zero bytes"), (b"not an image at all", "not an image")]
)
def test_parquet_undecodable_image_names_the_record(
    tmp_path: Path,
    write_parquet: Callable[..., Path],
    photo: Callable[..., bytes],
    bad: bytes,
    reason: str,
) -> None:
    source = write_parquet([photo(8, 8), bad, photo(8, 8)], [0, 0, 1])
    with pytest.raises(DataError, match=f"record 1.*set_train/1.*{reason}"):
        make_shards(f"parquet:{source}", tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_parquet_struct_images_are_read(tmp_path: Path, photo: Callable[..., bytes]) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    images = [{"bytes": photo(8, 9, i), "path": f"{i}.jpg"} for i in range(3)]
    pq.write_table(pa.table({"img": images, "label": [0, 1, 0]}), path)
    make_shards(f"parquet:{tmp_path}", tmp_path / "out")
    assert pixels_of(tmp_path / "out") == [image["bytes"] for image in images]
    assert ShardSet.open(tmp_path / "out" / "train").image.shape == (3, 8, 9)


def test_parquet_photos_of_different_sizes_have_no_common_shape(
    tmp_path: Path, write_parquet: Callable[..., Path], photo: Callable[..., bytes]
) -> None:
    source = write_parquet([photo(20, 30), photo(40, 10)], [0, 1])
    make_shards(f"parquet:{source}", tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out" / "train")
    assert shards.image.shape is None
    assert (shards.image.smallest, shards.image.largest) == ((20, 10), (40, 30))


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
def test_parquet_real_grey_sets_have_their_published_constants(
    data_folder: Path, tmp_path: Path, name: str
) -> None:
    make_shards(f"parquet:{data_folder / name}", tmp_path)
    train = ShardSet.open(tmp_path / "train")
    mean, std = {"fashion_mnist": (0.2860, 0.3530), "mnist": (0.1307, 0.3081)}[name]
    assert (train.num_samples, train.image.shape, train.num_classes) == (60_000, (1, 28, 28), 10)
    assert train.image.mean[0] == pytest.approx(mean, abs=1e-4)
    assert train.image.std[0] == pytest.approx(std, abs=1e-4)
    assert ShardSet.open(tmp_path / "test").num_samples == 10_000


def test_parquet_real_photos_are_read(data_folder: Path, tmp_path: Path) -> None:
    make_shards(f"parquet:{data_folder / 'caltech101_jpeg192'}", tmp_path, "test")
    shards = ShardSet.open(tmp_path / "test")
    assert shards.num_samples == 606 and shards.class_counts == (6,) * 101
    assert shards.image.shape is None and shards.class_names[0] == "Faces"
